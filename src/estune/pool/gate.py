"""Who reads the base and who changes it: perturbing members, side by side, or an update, alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets any number of readers in, or one writer alone. A writer that waits is let in before further readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writers = 0  # at work or waiting
        self._alone = threading.Lock()  # of those, for one at a time

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within this, the base is only read, beside other readers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within this, the base may be changed, alone."""
        with self._changed:
            self._writers += 1
            self._changed.wait_for(lambda: not self._readers)
        try:
            with self._alone:
                yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

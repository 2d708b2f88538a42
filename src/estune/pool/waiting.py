"""A word now and then while something takes long that shows nothing by itself, such as the loading of a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

log = logging.getLogger(__name__)

FIRST_WORD = 15.0  # seconds
NEXT_WORD = 60.0


class Wait(NamedTuple):
    """Something that is waited for: how far it has come, in words, and the share that is done, if it is known."""

    what: str
    so_far: Callable[[], str] = str
    share: Callable[[], float] | None = None


_waits: list[Wait] = []


def waited_for() -> Wait | None:
    """What is waited for at this moment, or None."""
    return _waits[-1] if _waits else None


@contextmanager
def told_while(
    what: str,
    first: float = FIRST_WORD,
    then: float = NEXT_WORD,
    so_far: Callable[[], str] = str,
    share: Callable[[], float] | None = None,
) -> Iterator[None]:
    """Log now and then, as long as this lasts, what is waited for and how long it has taken so far.

    Args:
        what: what is waited for.
        first, then: seconds until the first message, and between two.
        so_far: says how far it has come, from any thread.
        share: the same as a number from 0 to 1, for a bar.
    """
    began = time.monotonic()
    over = threading.Event()

    def tell() -> None:
        pause = first
        while not over.wait(pause):
            log.warning("still %s%s, for %.0f s now", what, so_far(), time.monotonic() - began)
            pause = then

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    wait = Wait(what, so_far, share)
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)
        over.set()
        thread.join()

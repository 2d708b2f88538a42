"""A word now and then while something takes long that shows nothing by itself, such as the loading of a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

FIRST_WORD = 15.0  # seconds
NEXT_WORD = 60.0

_waits: list[tuple[str, Callable[[], str]]] = []


def waited_for() -> tuple[str, str] | None:
    """What is waited for at this moment, if it is anything, and how far it has come."""
    if not _waits:
        return None
    what, so_far = _waits[-1]
    return what, so_far()


@contextmanager
def told_while(
    what: str, first: float = FIRST_WORD, then: float = NEXT_WORD, so_far: Callable[[], str] = str
) -> Iterator[None]:
    """Log what is waited for, and for how long it has been, as long as this lasts.

    Args:
        what: is waited for.
        first, then: seconds until the first word, and between two.
        so_far: says how far it has come, from any thread.
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
    wait = (what, so_far)
    _waits.append(wait)
    try:
        yield
    finally:
        _waits.remove(wait)
        over.set()
        thread.join()

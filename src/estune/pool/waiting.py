"""A word now and then while something takes long that shows nothing by itself, such as the loading of a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

FIRST_WORD = 15.0  # seconds
NEXT_WORD = 60.0


@contextmanager
def told_while(what: str, first: float = FIRST_WORD, then: float = NEXT_WORD) -> Iterator[None]:
    """Log what is waited for, and for how long it has been, as long as this lasts.

    Args:
        what: is waited for.
        first, then: seconds until the first word, and between two.
    """
    began = time.monotonic()
    over = threading.Event()

    def tell() -> None:
        pause = first
        while not over.wait(pause):
            log.warning("still %s, for %.0f s now", what, time.monotonic() - began)
            pause = then

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

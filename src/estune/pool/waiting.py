"""A word now and then while something takes long that shows nothing by itself, such as the loading of a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from estune.pool.base import Generating

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


@contextmanager
def told_while_generating(what: str, generator: Generating, prompt_tokens: int, places: int) -> Iterator[None]:
    """`told_while` something is generated, with the share that is done and the rate.

    Args:
        what: what is done.
        generator: generates.
        prompt_tokens: of all prompts together, each as often as it is read.
        places: tokens of all completions if each is as long as it may be.
    """
    before = generator.progress()
    began = time.monotonic()

    def share() -> float:
        done = generator.progress().since(before)
        return min(1.0, (done.read + done.settled) / (prompt_tokens + places))

    def so_far() -> str:
        speed = generator.progress().since(before).tokens / max(1e-9, time.monotonic() - began)
        return f": {share():.0%} at {speed:,.0f} tokens/s"

    with told_while(what, so_far=so_far, share=share):
        yield

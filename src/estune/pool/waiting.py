"""A word now and then while something takes long that shows nothing by itself, such as the loading of a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from estune.weights.locate import check_name, is_here

if TYPE_CHECKING:
    from estune.pool.base import Generating

log = logging.getLogger(__name__)

FIRST_WORD = 15.0  # seconds
NEXT_WORD = 60.0
HUB_SECONDS = 3.0  # until the first word where the hub is asked: without a network it is tried for some 20


class Wait(NamedTuple):
    """Something that is waited for: how far it has come, in words, and the share that is done; None: nobody knows."""

    what: str
    so_far: Callable[[], str] = str
    share: Callable[[], float | None] = lambda: None


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
    share: Callable[[], float | None] = lambda: None,
) -> Iterator[None]:
    """Log now and then, as long as this lasts, what is waited for and how long it has taken so far.

    Args:
        what: what is waited for.
        first, then: seconds until the first message, and between two.
        so_far: says how far it has come, from any thread.
        share: the same as a number from 0 to 1, for a bar; None where nobody knows.
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


def check_model(model: str | Path) -> None:
    """Check that there is a model of this name, and tell where the hub takes long to answer.

    Raises:
        EstuneError: as `locate`.
    """
    if is_here(model):
        check_name(model)
        return
    with told_while(f"asking the hub for {model}", HUB_SECONDS):
        check_name(model)


@contextmanager
def told_while_loading(what: str) -> Iterator[None]:
    """`told_while` transformers loads a model, with what it would draw a bar of: how many tensors are read.

    The share is unknown before the first and after the last, as more is made ready than weights.

    Args:
        what: is done.
    """
    from transformers.utils.logging import set_tqdm_hook

    tensors = _Counted()
    before = set_tqdm_hook(tensors.hear)
    try:
        with told_while(what, so_far=tensors.so_far, share=tensors.share):
            yield
    finally:
        set_tqdm_hook(before)


class _Counted:
    """Counts what transformers loads in the place of its bar, whose other bars stay as they are."""

    def __init__(self) -> None:
        self._done = 0
        self._all = 0

    def hear(self, factory: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return self._each(*positional) if named.get("desc") == "Loading weights" else factory(*positional, **named)

    def _each(self, tensors: Any) -> Iterator[Any]:
        self._done = 0
        self._all = len(tensors)
        for tensor in tensors:
            yield tensor
            self._done += 1

    def so_far(self) -> str:
        return f": {self._done:,} of {self._all:,} tensors" if self._all else ""

    def share(self) -> float | None:
        return self._done / self._all if self._done < self._all else None


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

"""A place for a worker, as the crew sees it: who is there, where workers come from, and what there is to do."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from estune.errors import EstuneError
from estune.pool.base import Description
from estune.pool.deadlines import Deadlines
from estune.pool.worker import Place

State = Literal["waiting", "loading", "ready", "refused", "ended"]


class Handle(Protocol):
    """A worker as the pool sees it, in messages by its text."""

    place: Place | None
    done: int | None
    """Updates that its weights have had; None where they must be built anew."""

    def look(self, seconds: float) -> Place | None:
        """Where the worker runs; None if it is not there after `seconds` seconds.

        Raises:
            Lost: it was there and has ended.
            EstuneError: it never will be of use.
        """
        ...

    def open(self) -> tuple[Description, int | None]:
        """Let the worker load the model; return what it trains, and the updates that its weights have had by now."""
        ...

    def call(self, kind: str, *arguments: Any, units: int = 1) -> Any:
        """Call a method of the worker, and wait for the result.

        Raises:
            Lost: it is gone, or did not answer in time.
            Exception: the method raised it.
        """
        ...

    def end(self) -> None:
        """End what there is of it, even if it does not answer."""
        ...


class Source(Protocol):
    """Where workers come from."""

    def hire(self, number: int, deadlines: Deadlines) -> Handle:
        """The worker of a place, which starts as soon as there is room for it."""
        ...

    def check(self, *, at_once: bool = False) -> None:
        """Check that there can be workers at all.

        Raises:
            EstuneError: what all of them need is gone.
        """
        ...

    def missing(self, seconds: float, lost: str) -> str:
        """What to say of having had no worker for so long, `lost` being how the last one was lost, if one was."""
        ...


@dataclass(eq=False)
class Job:
    """Something for a worker to do: a call of one of `Worker`'s methods.

    If it is for any worker that is free, `arguments` are those after `done`, the number of updates the worker has made.
    """

    kind: str
    arguments: tuple[Any, ...]
    finished: deque[Job]  # where it goes once it is done or has failed; if for one worker alone, also when it is lost
    index: int = 0
    alone: bool = False
    handle: Handle | None = None  # the worker that does it, or did
    losses: int = 0
    errors: list[Exception] = field(default_factory=list)
    done: bool = False
    result: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class Slot:
    """A place for a worker, and the worker in it."""

    number: int
    state: State = "waiting"
    since: float = field(default_factory=time.monotonic)
    handle: Handle | None = None
    own: deque[Job] = field(default_factory=deque)
    busy: bool = False  # with a job that was for whoever is free
    losses: int = 0  # since its worker last finished something
    errors: list[Exception] = field(default_factory=list)  # on starting

    def __str__(self) -> str:
        return str(self.handle) if self.handle else f"worker {self.number}"


def compare(handle: Handle, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a worker that differs from what is expected of all.

    Raises:
        EstuneError: something differs; the message names the first such thing and both values.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise EstuneError(
                f"{handle} differs from the others: its {key} is {_short(found.get(key))}, theirs {_short(value)}; "
                "make that machine like the others"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."

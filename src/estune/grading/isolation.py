"""Which reward functions run in a process of their own, one completion a call, and within which limits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from estune.errors import EstuneError

Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "__estune_isolation__"


@dataclass(frozen=True, slots=True)
class Isolation:
    """Limits of one call.

    `deadline` is in seconds, None for the run's. `memory` is in bytes beyond what the grader needs when idle, with
    those of its children, such as programs in the sandbox. `max_length` is in characters of the completion. A
    completion that is too long, or whose grading does not end in time or crashes, scores `failure_score`. With
    `errors_as_crashes` an exception is such a crash, unless an empty completion in a fresh grader raises one too: for
    functions that read what a model wrote with care, as estune's own do.
    """

    deadline: float | None = None
    memory: int = 2 << 30
    max_length: int = 20_000
    failure_score: float = 0.0
    errors_as_crashes: bool = False


@overload
def isolated(function: Function, /) -> Function: ...


@overload
def isolated(
    *,
    deadline: float | None = None,
    memory: int = 2 << 30,
    max_length: int = 20_000,
    failure_score: float = 0.0,
    errors_as_crashes: bool = False,
) -> Callable[[Function], Function]: ...


def isolated(function: Any = None, /, **limits: Any) -> Any:
    """Mark a reward function as one to be called in a grader process, with lists of length one.

    Called directly it works as before. It must be importable: at the top level of a module, a script or a file, or an
    object that can be pickled.

    Args:
        function: the function, where the decorator is used without brackets.
        limits: those of `Isolation`.
    """
    if function is None:
        return lambda function: isolate(function, Isolation(**limits))
    return isolate(function, Isolation())


def isolate(function: Function, isolation: Isolation) -> Function:
    """Mark a function, which may be another library's."""
    setattr(function, _MARK, isolation)
    return function


def isolation_of(function: Any) -> Isolation | None:
    """The limits that a function is marked with; a `functools.partial` has those of what it wraps."""
    while isinstance(function, functools.partial) and not hasattr(function, _MARK):
        function = function.func
    found: Isolation | None = getattr(function, _MARK, None)
    return found


IN_GRADER = False
"""Whether this process is a grader, which imports the user's script, but must not train by it."""

GUARD = (
    'a grader imports the script that trains: put what it runs behind `if __name__ == "__main__":`, or define the '
    "isolated rewards in a file of their own and import them from there"
)


def refuse_grader() -> None:
    """Refuse to train in a grader, before anything is written.

    Raises:
        EstuneError: this process is a grader; the message says what to change in the script.
    """
    if IN_GRADER:
        raise EstuneError(GUARD)

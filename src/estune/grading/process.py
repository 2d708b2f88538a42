"""A grader: a process that calls reward functions on one completion at a time, and can be killed at any moment.

`pool.py` starts it. It imports nothing that its functions do not, and ends when the one that started it does.
"""

from __future__ import annotations

import asyncio
import pickle
import resource
import sys
from dataclasses import dataclass, field
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from estune.children import end_with_parent
from estune.grading.convention import Log, TrainerState, arguments, as_scores, describe, is_async


@dataclass(frozen=True, slots=True)
class Setup:
    """What a grader needs to be ready: where to import from, its functions as a pickle, and its limit in bytes."""

    preparation: dict[str, Any]
    files: dict[str, str]
    functions: bytes
    memory: int


@dataclass(frozen=True, slots=True)
class Call:
    """One completion for the function of this number."""

    function: int
    columns: dict[str, list[Any]]
    state: TrainerState


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a call: a score (None: does not apply), or why there is none."""

    kind: Literal["score", "errors", "timeouts", "crashes", "too_long"]
    score: float | None = None
    text: str = ""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    """Serve calls from the connection whose file descriptor is named on the command line until it is closed."""
    end_with_parent(with_thread=True)
    connection = Connection(int(sys.argv[1]))
    try:
        functions = _prepare(connection.recv())
    except BaseException as error:
        connection.send(describe(error))
        return
    connection.send("")
    while True:
        try:
            call: Call = connection.recv()
        except EOFError:
            return
        verdict = _grade(functions[call.function], call)
        try:
            connection.send(verdict)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send(Verdict("errors", text=f"logged what cannot be sent to the trainer: {describe(error)}"))


def _prepare(setup: Setup) -> dict[int, Any]:
    """Import what the functions need, and limit the memory to so much more than that."""
    from estune.grading import isolation, modules

    isolation.IN_GRADER = True
    spawn.prepare(setup.preparation)
    for path in setup.files.values():
        modules.load_file(Path(path))
    functions: dict[int, Any] = pickle.loads(setup.functions)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not enforce it
        # Data, not address space: torch and numba reserve tens of GB that they never touch.
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + setup.memory, resource.RLIM_INFINITY))
    return functions


def _grade(function: Any, call: Call) -> Verdict:
    log = Log(1)
    try:
        returned = function(**arguments(call.columns, call.state, log))
        if is_async(function):
            returned = asyncio.run(_awaited(returned))
        (score,) = as_scores(returned, 1)
    except MemoryError:
        return Verdict("crashes", text="out of memory")
    except Exception as error:
        return Verdict("errors", text=describe(error))
    return Verdict("score", score, extras=log.extras, metrics=log.metrics)


async def _awaited(returned: Any) -> Any:
    return await returned

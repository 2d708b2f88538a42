"""A grader: a process that calls reward functions on one completion at a time, and can be killed at any moment.

`pool.py` starts it. It imports nothing that its functions do not, and ends when the one that started it does.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import resource
import socket
import sys
from dataclasses import dataclass, replace
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from estune.children import end_with_parent
from estune.errors import EstuneError
from estune.grading.containment import State, contained
from estune.grading.convention import Log, TrainerState, arguments, as_scores, describe, is_async
from estune.grading.seccomp import deny_shared_memory
from estune.grading.verdict import Verdict
from estune.grading.wire import Wire


@dataclass(frozen=True, slots=True)
class Setup:
    """What a grader needs: where to import from, its functions as a pickle, and its memory limit in bytes."""

    preparation: dict[str, Any]
    files: dict[str, str]
    functions: bytes
    memory: int


@dataclass(frozen=True, slots=True)
class Call:
    """One completion for a function, which is given by its number."""

    function: int
    columns: dict[str, list[Any]]
    state: TrainerState

    def with_empty_completion(self) -> Call:
        """The same call with an empty completion."""
        (said,) = self.columns["completions"]
        empty = "" if isinstance(said, str) else [{**message, "content": ""} for message in said]
        return replace(self, columns=self.columns | {"completions": [empty], "completion_ids": [[]]})


def main() -> None:
    """Serve calls from the socket whose file descriptor is named on the command line until it is closed."""
    end_with_parent(with_thread=True)
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    # What is printed past Python goes nowhere: the terminal is the trainer's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        functions = _prepare(pickle.loads(wire.receive()))
    except BaseException as error:
        wire.send(json.dumps(describe(error)).encode())
        return
    wire.send(json.dumps("").encode())
    state = State()
    for number in itertools.count():
        try:
            call: Call = pickle.loads(wire.receive())
        except EOFError:
            return
        wire.send(_encoded(_grade(functions[call.function], call, state), number))


def _encoded(verdict: Verdict, number: int) -> bytes:
    try:
        return verdict.encode(number)
    except (TypeError, ValueError, RecursionError) as error:
        problem = f"logged what JSON cannot hold: {' '.join(str(error).split())}"
        return Verdict("errors", text=problem).encode(number)


def _prepare(setup: Setup) -> dict[int, Any]:
    """Import what the functions need, and limit this process to `setup.memory` bytes beyond that.

    `pool.py` watches what this limit does not count: shared memory, and what all processes hold together.
    """
    from estune.grading import isolation, modules

    isolation.IN_GRADER = True
    try:
        spawn.prepare(setup.preparation)
    except BaseException as error:  # whatever the user's script does when it runs again
        said = "" if str(error) == isolation.GUARD else f" (run again, it {describe(error)})"
        raise EstuneError(f"{isolation.GUARD}{said}") from error
    for path in setup.files.values():
        modules.load_file(Path(path))
    functions: dict[int, Any] = pickle.loads(setup.functions)
    for function in functions.values():
        # What a function imports when first called, which is not the first completion's time.
        getattr(function, "prepare", lambda: None)()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not enforce it
        # Data, not address space: torch and numba reserve tens of GB that they never touch.
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + setup.memory, resource.RLIM_INFINITY))
        deny_shared_memory()  # which neither that limit counts nor `held`
    return functions


def _grade(function: Any, call: Call, state: State) -> Verdict:
    log = Log(1)
    with contained(state) as around:
        try:
            returned = function(**arguments(call.columns, call.state, log))
            if is_async(function):
                import asyncio  # a fifth of the imports of a grader, most of which have no such function

                returned = asyncio.run(_awaited(returned))
            (score,) = as_scores(returned, 1)
            if isinstance(score, Exception):
                raise score
            verdict = Verdict("score", score, "", log.extras, log.metrics, log.counts)
        except MemoryError:
            verdict = Verdict("crashes", text="out of memory")
        except BaseException as error:  # Ctrl-C does not reach a grader: whatever it is, the function raised it
            verdict = Verdict("errors", text=describe(error))
    return replace(verdict, notes=around.notes)


async def _awaited(returned: Any) -> Any:
    return await returned

"""A pool of grader processes that stays at full strength, whatever its graders are given to grade.

Each grader has a thread and a connection of its own. Pools whose workers share a queue and locks (`pebble` 5.2)
stall when one is killed while it holds a lock; and `concurrent.futures` cannot end a call at all.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from estune.errors import EstuneError
from estune.grading import modules
from estune.grading.convention import RewardFunction, reward_name
from estune.grading.held import held, held_at_most
from estune.grading.isolation import isolation_of
from estune.grading.process import Call, Setup
from estune.grading.verdict import Verdict, decode, decode_problem
from estune.grading.wire import Garbled, Wire

START_SECONDS = 120
_FASTEST = 8 << 30  # bytes a second, at which processes can come to hold memory
_MOST_OFTEN = 0.002  # seconds between two looks at what a grader holds
# Not `-m`: what a main module defines is known by another name on this side.
_START = "from estune.grading.process import main; main()"


class GraderPool:
    """Calls functions in `processes` graders.

    Args:
        functions: what a `Call` refers to, by number.
        processes: number of graders, which start when they are first needed; if functions are the user's script's, one
            starts at once.
        memory: bytes a grader may grow by, with its children, beyond what importing its functions takes.

    Raises:
        EstuneError: for a function that another process cannot import.
    """

    def __init__(self, functions: Mapping[int, RewardFunction], processes: int, memory: int) -> None:
        self._setup = _setup(functions, memory)
        limits = {number: isolation_of(function) for number, function in functions.items()}
        self._errors_as_crashes = {number for number, limit in limits.items() if limit and limit.errors_as_crashes}
        self._processes = processes
        self._threads = ThreadPoolExecutor(processes, "estune-grader")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._graders: set[_Grader] = set()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        if any(key.startswith("init_main") for key in self._setup.preparation):
            self._try_script()

    def submit(self, call: Call, deadline: float) -> Future[Verdict]:
        """Have a call made by the grader that is free first; `deadline` is in seconds from its beginning."""
        return self._threads.submit(self._run, call, deadline)

    def pids(self) -> list[int]:
        """Process ids of the graders that there are now."""
        with self._lock:
            return [grader.process.pid for grader in self._graders]

    def close(self) -> None:
        """Kill the graders, whatever they are doing, and drop what is queued."""
        with self._lock:
            self._closed.set()
            for grader in self._graders:
                grader.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for grader in self._graders:
            grader.close()
        self._graders.clear()

    def _try_script(self) -> None:
        """Start a grader before anything else is done, to see whether it can import the user's script."""
        try:
            self._threads.submit(lambda: self._start().get_ready()).result()
        except BaseException:
            self.close()
            raise

    def _run(self, call: Call, deadline: float) -> Verdict:
        grader = self._mine.__dict__.get("grader") or self._start()
        used = grader.calls > 0
        verdict = self._call(grader, call, deadline)
        if verdict.kind == "crashes" and used:
            # Earlier calls may be the cause: a crash is this completion's where a fresh grader has it too.
            verdict = self._call(self._mine.grader, call, deadline)
        return verdict

    def _call(self, grader: _Grader, call: Call, deadline: float) -> Verdict:
        verdict = self._answer(grader, call, deadline)
        if verdict.kind == "errors" and call.function in self._errors_as_crashes:
            # The completion may have raised it, or made the grader say so. The row and the machine are at fault where
            # a grader that has never seen it says the same.
            fresh = self._replace(grader)
            if self._answer(fresh, call.with_empty_completion(), deadline).kind != "errors":
                verdict = replace(verdict, kind="crashes")
        return verdict

    def _answer(self, grader: _Grader, call: Call, deadline: float) -> Verdict:
        verdict = grader.call(call, deadline)
        if verdict.kind in ("timeouts", "crashes"):
            self._replace(grader)
        return verdict

    def _replace(self, grader: _Grader) -> _Grader:
        with self._lock:
            self._graders.discard(grader)
        grader.close()
        return self._start()

    def _start(self) -> _Grader:
        """A new grader for this thread. It gets ready while others work."""
        with self._lock:
            if self._closed.is_set():
                raise EstuneError("the graders have been closed")
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="estune-grader-memory", daemon=True)
                self._watcher.start()
            grader = _Grader(self._setup)
            self._graders.add(grader)
        self._mine.grader = grader
        return grader

    def _watch(self) -> None:
        """Look at each grader again before it could hold more than it may: the sooner, the less is left to it."""
        seconds = most = self._setup.memory / _FASTEST
        while not self._closed.wait(max(seconds, _MOST_OFTEN)):
            with self._lock:
                graders = list(self._graders)
            seconds = min((grader.left() / _FASTEST for grader in graders), default=most)


class _Grader:
    """A process and the connection to it. It belongs to the thread that made it, with which the kernel ends it."""

    def __init__(self, setup: Setup) -> None:
        self.calls = 0
        self._ready = False
        self._setup = setup
        self._most: int | None = None  # bytes that it may hold, once it is ready
        self._over = False
        ours, theirs = socket.socketpair()
        self._wire = Wire(ours)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the trainer alone; and what it starts can be killed with it
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def call(self, call: Call, deadline: float) -> Verdict:
        """Make a call. A grader that gave no verdict in time, or crashed, must not be used any more."""
        try:
            self.get_ready()
            number = self.calls
            self.calls += 1
            # One that an earlier completion has stopped may not even take the call.
            self._wire.send(pickle.dumps(call), deadline)
            return decode(self._wire.receive(deadline), number)
        except TimeoutError:
            return Verdict("timeouts", text=f"no score within {deadline:g} s")
        except Garbled as error:
            return Verdict("crashes", text=f"the grader answered with {error}")
        except (EOFError, ConnectionError):
            self.kill()
            code = self.process.wait()
            why = "held more memory than it may, with its children" if self._over else f"ended with code {code}"
            return Verdict("crashes", text=f"the grader {why}")

    def left(self) -> int:
        """Bytes that it may hold beyond what it does. If it holds too many, it is ended."""
        if self._most is None:
            return self._setup.memory
        left = self._most - held_at_most(self.process.pid)
        if left < 0:
            left = self._most - held(self.process.pid)
        if left < 0:
            self._over = True
            self.kill()
        return left

    def kill(self) -> None:
        """End the process and those it started, which a crash of its own leaves running."""
        # Not `poll`: until the process is waited for, no other group can have its number.
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, where all of them are dead
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, and release what belongs to it."""
        self.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._wire.close()

    def get_ready(self) -> None:
        """Let the process import what it needs; that is not the completion's time.

        Raises:
            EstuneError: it cannot.
        """
        if self._ready:
            return
        try:
            self._wire.send(pickle.dumps(self._setup), START_SECONDS)
            problem = decode_problem(self._wire.receive(START_SECONDS))
        except TimeoutError as error:
            raise EstuneError(
                f"a grader needs more than {START_SECONDS} s to import the rewards; make that faster"
            ) from error
        if problem:
            raise EstuneError(f"the isolated rewards cannot be loaded in another process: {problem}")
        self._most = held_at_most(self.process.pid) + self._setup.memory
        self._ready = True


def _setup(functions: Mapping[int, RewardFunction], memory: int) -> Setup:
    pickles = []
    for function in functions.values():
        try:
            pickles.append(pickle.dumps(function))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise EstuneError(
                f"reward {reward_name(function)} is isolated, and other processes cannot import it "
                f"({' '.join(str(error).split())}); define it at the top level of a module"
            ) from error
    preparation: dict[str, Any] = spawn.get_preparation_data("estune-grader")
    mains = [f for f, data in zip(functions.values(), pickles, strict=True) if b"__main__" in data]
    file = preparation.get("init_main_from_path", "")
    if mains and "init_main_from_name" not in preparation and not Path(file).is_file():
        raise EstuneError(
            f"reward {reward_name(mains[0])} is isolated, and it is defined in a notebook or at a prompt, which other "
            "processes cannot import: define it in a file of its own, such as my_rewards.py, and import it from there"
        )
    if not mains:
        # The user's script may be heavy to import, or be no module at all.
        preparation = {key: value for key, value in preparation.items() if not key.startswith("init_main")}
    preparation.pop("authkey", None)
    return Setup(preparation, dict(modules.FILES), pickle.dumps(dict(functions)), memory)

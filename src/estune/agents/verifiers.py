"""Rollouts of verifiers: played by its own code, many side by side in one process, each with a key of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from estune.agents.play import Limits, Run, Stopped, TooLong
from estune.agents.program import end
from estune.agents.served import ServedPlayer
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError, printable
from estune.grading.rollout import Outcome, outcome_of
from estune.tasks.verifiers import Bridge, last_line

_CLOSE_SECONDS = 15.0


class VerifiersPlayer(ServedPlayer):
    """As `Player`, for environments of verifiers."""

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        super().__init__(encoder, limits)
        self._lock = threading.Lock()
        self._programs: dict[Bridge, _Program] = {}

    def close(self) -> None:
        """As `Player.close`."""
        super().close()
        for program in self._programs.values():
            program.close()
        self._programs.clear()

    def play(self, run: Run) -> Outcome:
        """As `Player.play`."""
        task = json.loads(run.opening.row["task"])
        with self.admitted(run) as (url, key):
            program = self._program(run.opening.rollout.target)
            number, future = program.ask({"task": task, "url": url, "key": key, "model": self._encoder.name})
            run.on_abort(lambda: program.drop(number))
            try:
                said = future.result()
            except CancelledError:
                raise Stopped("was ended") from None
        failure, why = said.get("failure"), printable(str(said.get("why"))[:300])
        if failure == "timeouts":
            raise TimeoutError(why)
        if failure == "too_long":
            raise TooLong(why)
        if failure is not None:
            raise EstuneError(f"{run.opening.rollout.target.taskset}: {why}")
        return outcome_of({"reward": said["reward"], "metrics": said["metrics"]})

    def _program(self, bridge: Bridge) -> _Program:
        """The program that plays an environment, started again if it has ended."""
        with self._lock:
            program = self._programs.get(bridge)
            if program is None or program.ended:
                program = self._programs[bridge] = _Program(bridge)
            return program


class _Program:
    """A running `verifiers_bridge.py`."""

    def __init__(self, bridge: Bridge) -> None:
        self.ended = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self._process: subprocess.Popen[str] = bridge.start(self._errors)
        self._lock = threading.Lock()
        self._asked = 0
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._tell(bridge.first_line)
        self._reader = threading.Thread(target=self._read, name="estune-verifiers", daemon=True)
        self._reader.start()

    def ask(self, what: Mapping[str, Any]) -> tuple[int, Future[dict[str, Any]]]:
        """Have a task played; return its number, and a future of what it comes to."""
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            self._asked += 1
            number = self._asked
            if not self.ended:
                self._waiting[number] = future
                self._tell(json.dumps({"play": number, **what}) + "\n")
                return number, future
        future.set_exception(Stopped("its program has ended"))
        return number, future

    def drop(self, number: int) -> None:
        """Stop waiting for a rollout."""
        with self._lock:
            future = self._waiting.pop(number, None)
            if future is not None:
                future.cancel()
                self._tell(json.dumps({"drop": number}) + "\n")

    def close(self) -> None:
        """End it, and what it has started."""
        assert self._process.stdin is not None
        with self._lock, suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        end(self._process)
        self._reader.join()
        self._errors.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, which is seen where it is read
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        error = ""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                said = json.loads(line)
                error = said.get("error", error)
                with self._lock:
                    future = self._waiting.pop(said.get("played"), None)
                if future is not None:
                    future.set_result(said)
        code = self._process.wait()
        with self._lock:
            self.ended = True
            left = list(self._waiting.values())
            self._waiting.clear()
        why: Exception = EstuneError(error) if error else Stopped(last_line(self._errors, code))
        for future in left:
            future.set_exception(why)

"""Rollouts that are programs: the endpoint in their environment, the row on standard input, the reward printed last.

A program runs as the user, with all that the user may do. It and what it started end with the rollout, and with the
process that plays it, however that ends.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import psutil

from estune.agents.keeper import KEY, Keeper, end_all_with
from estune.agents.play import Limits, Run, Stopped
from estune.agents.served import ServedPlayer
from estune.completion import Sampling
from estune.engines.continuous import Batcher
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError, printable
from estune.grading.rollout import Outcome, outcome_of_line

MOST_PLAYS = 3
"""How often a rollout is played at most, if its program is killed each time."""
LONGEST = 1 << 20
"""Bytes at the end of a program's output in which its last line is looked for."""


class ProgramPlayer(ServedPlayer):
    """As `Player`, for commands."""

    def __init__(self, encoder: PromptEncoder, limits: Limits) -> None:
        super().__init__(encoder, limits)
        self._keys: set[str] = set()
        self._keeper: Keeper | None = None

    def open(self, batcher: Batcher, sampling: Sampling) -> None:
        """As `Player.open`."""
        super().open(batcher, sampling)
        self._keeper = self._keeper or Keeper()

    def shut(self) -> None:
        """As `Player.shut`; programs that others have started end too, if they still have a rollout's key."""
        super().shut()
        end_all_with(self._keys)
        self._keys.clear()

    def close(self) -> None:
        """As `Player.close`."""
        super().close()
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def play(self, run: Run) -> Outcome:
        """As `Player.play`. A program that is killed is played again: it may have been somebody else's doing."""
        command = run.opening.rollout.target
        arguments = shlex.split(command) if isinstance(command, str) else list(command)
        for play in range(1, MOST_PLAYS + 1):
            code, said, complained = self._play(run, arguments)
            if run.over:
                raise Stopped("was ended")
            if code >= 0:
                break
            if play == MOST_PLAYS:
                raise Stopped(f"was killed by {_signal_name(-code)}, {MOST_PLAYS} times")
            run.begin_again()
        if code:
            last = printable((complained or [""])[-1][:300])
            raise EstuneError(f"{command!r:.60} ended with code {code}: {last or 'it said nothing'}")
        if not said:
            raise EstuneError(f"{command!r:.60} printed nothing: print the reward on the last line")
        return outcome_of_line(said[-1])

    def _play(self, run: Run, arguments: list[str]) -> tuple[int, list[str], list[str]]:
        """Run the program once; return its exit code, and the last lines of its output and of its errors."""
        with self.admitted(run) as (url, key), tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            self._keys.add(key)
            assert self._keeper is not None
            self._keeper.tell(key)
            environment = {
                "OPENAI_BASE_URL": url,
                "OPENAI_API_BASE": url,  # as older clients call it
                KEY: key,
                "OPENAI_MODEL": self._encoder.name,
                "ESTUNE_SEED": str(run.seed),
            }
            with started(arguments, environment, out, err) as process:
                run.on_abort(lambda: end(process))
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it does not read
                    process.stdin.write(json.dumps(run.opening.row, default=str).encode() + b"\n")
                    process.stdin.close()
                code = process.wait()
            return code, _last_lines(out), _last_lines(err)


@contextmanager
def started(
    arguments: list[str], environment: dict[str, str], out: IO[bytes], err: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own. It ends with this context, and so does what it has started.

    Raises:
        EstuneError: there is no such program.
    """
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except (OSError, IndexError, ValueError) as error:
        raise EstuneError(
            f"the program {' '.join(arguments)!r:.60} cannot be started: {error}; see task.program"
        ) from error
    try:
        yield process
    finally:
        end(process)
        process.wait()
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a program and what it has started: its session and, while it lives, its children in others."""
    family: list[psutil.Process] = []
    if process.poll() is None:
        with suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        with suppress(psutil.Error):
            child.kill()


def _last_lines(file: IO[bytes]) -> list[str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST))
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""Environments of the library `verifiers`, played by its own code: `verifiers:TASKSET`.

verifiers wants an older client of OpenAI's than others do, so it may live in a Python environment of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from pydantic import Field

from estune.errors import EstuneError, printable
from estune.grading.convention import Row
from estune.grading.rollout import Rollout, with_rollout
from estune.tasks.base import Task
from estune.tasks.options import OwnOptions, TaskOptions, identity, is_held_out, refuse_empty_side

PREFIX = "verifiers:"
SIZE = 200
"""Rows of each set of an endless taskset."""
_PROGRAM = Path(__file__).with_name("verifiers_bridge.py")


@dataclass(frozen=True)
class Bridge:
    """An environment of verifiers, and the Python that plays it.

    Attributes:
        python: the interpreter, which has verifiers.
        taskset: its name.
        options: the environment's configuration, as JSON.
    """

    python: str
    taskset: str
    options: str

    @property
    def first_line(self) -> str:
        """The first line that the program is told."""
        return json.dumps({"taskset": self.taskset, "options": json.loads(self.options)}) + "\n"

    def start(self, errors: IO[bytes]) -> subprocess.Popen[str]:
        """The program, `verifiers_bridge.py`, in a session of its own; it ends where its input does.

        Raises:
            EstuneError: it cannot be started.
        """
        beside = str(Path(self.python).parent)  # programs that come with verifiers
        try:
            return subprocess.Popen(
                [self.python, "-P", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PATH": os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])},
                start_new_session=True,
            )
        except OSError as error:
            raise EstuneError(f"task.python {self.python}: cannot be started: {error}") from error


class VerifiersConfig(TaskOptions):
    """Options of a task of verifiers."""

    summary: ClassVar[str] = "environments of the library verifiers, played by its own code"
    usual_data: ClassVar[str] = "the taskset's"

    name: str = Field(
        PREFIX, description="the task: verifiers:TASKSET", pattern=r"^verifiers:[\w./@-]+$", validate_default=False
    )
    python: str | None = Field(
        None, description="a Python interpreter that has verifiers 0.4; the one that runs estune, if not given"
    )
    options: OwnOptions = Field(
        default_factory=dict,
        description="the environment's configuration, as vf-eval takes it for env: task.options.taskset.KEY=VALUE",
    )
    eval_options: OwnOptions | None = Field(
        None,
        description="the same for the rows to evaluate on; if not given, an eighth of the tasks is held out, by a hash "
        "of each prompt, and of an endless taskset the first ones are",
    )
    accuracy: str | None = Field(
        None, description="name of the reward or metric whose mean is accuracy; the reward itself if not given"
    )

    def build(self, seed: int) -> Task:
        """Both sets, each row a task of the taskset.

        Raises:
            EstuneError: verifiers, the taskset or what it needs is missing, or its configuration is wrong.
        """
        train, evaluation = self._sets()
        functions, weights, accuracy = with_rollout([], [], self.accuracy)
        return Task(
            name=self.name,
            train=train[: self.train_size],
            evaluation=evaluation[: self.eval_size],
            reward_funcs=functions,
            reward_weights=weights,
            accuracy=accuracy,
            rollout=Rollout("verifiers", self._bridge(self.options)),
        )

    def _sets(self) -> tuple[list[Row], list[Row]]:
        sizes = (self.train_size or SIZE, self.eval_size or SIZE)
        if self.eval_options is not None:
            train, _ = self._rows(self.options, sizes[0])
            evaluation, _ = self._rows(self.eval_options, sizes[1])
            return train, evaluation
        rows, endless = self._rows(self.options, sum(sizes))
        if endless:
            return rows[sizes[1] :], rows[: sizes[1]]
        held_out = [is_held_out(identity(row)) for row in rows]
        train = [row for row, out in zip(rows, held_out, strict=True) if not out]
        evaluation = [row for row, out in zip(rows, held_out, strict=True) if out]
        refuse_empty_side(self.name, train, evaluation, "task.eval_options, the configuration of others")
        return train, evaluation

    def _bridge(self, options: Mapping[str, Any]) -> Bridge:
        """Where the task is played.

        Raises:
            EstuneError: there is no such interpreter.
        """
        python = sys.executable if self.python is None else os.path.expanduser(self.python)
        found = shutil.which(python)
        if found is None:
            raise EstuneError(f"task.python {python}: there is no such program; give a Python that has verifiers")
        return Bridge(os.path.abspath(found), self.name.removeprefix(PREFIX), json.dumps(options, sort_keys=True))

    def _rows(self, options: Mapping[str, Any], most: int) -> tuple[list[Row], bool]:
        """The tasks of a configuration, at most so many of an endless one, and whether it is endless."""
        bridge = self._bridge(options)
        with tempfile.TemporaryFile() as errors:
            with bridge.start(errors) as process:
                said, _ = process.communicate(bridge.first_line + json.dumps({"list": most}) + "\n")
            answers = [json.loads(line) for line in said.splitlines()]
            end = answers.pop() if answers else {}
            if "listed" not in end:
                raise EstuneError(f"task {self.name}: {end.get('error') or last_line(errors, process.returncode)}")
        return _distinct(answers), bool(end["endless"])


def _distinct(tasks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for each task; tasks that open with the same words are told apart by their names."""
    prompts = [str(task["prompt"]) for task in tasks]
    common = {prompt for prompt in prompts if not prompt or prompts.count(prompt) > 1} if prompts else set()
    return [
        {
            "prompt": f"{prompt} [{task['name']}]".strip() if prompt in common else prompt,
            "task": json.dumps(task["task"], sort_keys=True),
        }
        for prompt, task in zip(prompts, tasks, strict=True)
    ]


def last_line(errors: IO[bytes], code: int) -> str:
    """How a program ended that said nothing: its exit code, and the last line of its standard error."""
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f"its program ended with code {code}: {printable(lines[-1][:300]) if lines else 'it said nothing'}"

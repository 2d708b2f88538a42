"""A task in a Python file of your own: `estune train --task path/to/file.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row, describe, reward_name
from estune.grading.modules import load_file
from estune.grading.rollout import FromRollout, Kind, Rollout, by_program, with_rollout
from estune.rewards.load import in_conversation, load_reward
from estune.tasks.base import Task, as_message
from estune.tasks.options import TaskOptions, identity, is_held_out, refuse_empty_side
from estune.tasks.pictures import with_pictures
from estune.tasks.records import folder_of, load_records, whole_rows

SUFFIX = ".py"


class OwnConfig(TaskOptions):
    """Options of a task in a file: its path, and what its function `task` takes.

    The file has either a function `task(seed, **options)` that returns a `Task`, or these names:

    - `train`: rows with a prompt and the columns that rewards take, or a data set's file, directory or hub id;
    - `evaluation`: the same, to evaluate on; if there is none, an eighth of `train` is, by a hash of each prompt;
    - `rewards`: a reward function, or what names one, or a list of such;
    - `weights` (1 each), `accuracy` (the first reward's name), `gold` and `chat` (true), as in `Task`;
    - in the place of rewards, or beside them, what plays a row: `rollout`, a function `rollout(client, row)` that gives
      the reward, or `Environment`, a class with `reset(row)` and `step(completion)`. `accuracy` may then be one of the
      metrics that they give.
    """

    summary: ClassVar[str] = "a task of your own, in a Python file"
    usual_data: ClassVar[str] = "the file's"

    name: str = Field("", description="the task: the path of a Python file", pattern=r".+\.py$", validate_default=False)
    options: dict[str, Any] = Field(
        default_factory=dict, description="what the file's function task takes beside a seed"
    )

    program: str | None = Field(
        None,
        description="a command that plays a row in the place of rewards: it finds the model at OPENAI_BASE_URL, the "
        "row on standard input, and prints the reward last",
    )
    chat: bool | None = Field(
        None, description="prompts that are text as a user's message, for the chat template; true, if the file says not"
    )

    def build(self, seed: int) -> Task:
        """The file's task, under the file's path as its name.

        Raises:
            EstuneError: the file is not there, fails, or does not make a task.
        """
        if not Path(self.name).expanduser().is_file():
            raise EstuneError(f"task {self.name}: no such file here; give the path of a Python file")
        module = load_file(Path(self.name))
        make = getattr(module, "task", None)
        if callable(make):
            if self.program is not None:
                raise EstuneError(
                    f"task {self.name}: task.program is for files without a function task(seed); leave it out"
                )
            try:
                task = make(seed, **self.options)
            except EstuneError:
                raise
            except Exception as error:
                raise EstuneError(f"task {self.name}: its function task {describe(error)}") from error
            if not isinstance(task, Task):
                raise EstuneError(f"task {self.name}: its function task gave {type(task).__name__}, not a Task")
        else:
            task = self._of_names(module)
        chat = next((chat for chat in (self.chat, task.chat) if chat is not None), True)
        show = (task.show or as_message) if chat else None
        for function in task.reward_funcs:
            if not isinstance(function, FromRollout):
                in_conversation(function, show)
        return replace(
            task,
            name=self.name,
            train=task.train[: self.train_size],
            evaluation=task.evaluation[: self.eval_size],
            chat=chat,
            show=show,
        )

    def _of_names(self, module: ModuleType) -> Task:
        rollout = self._rollout(module)
        needed = ("train", "rewards") if rollout is None else ("train",)
        missing = next((name for name in needed if not hasattr(module, name)), None)
        if missing is not None:
            raise EstuneError(
                f"task {self.name}: no {missing}; the file needs a function task(seed), or the names train and "
                "rewards, rollout or Environment; rewards alone go to task.rewards: --task custom --task.data FILE "
                f"--task.rewards {self.name}:FUNCTION"
            )
        if self.options:
            raise EstuneError(f"task {self.name}: task.options are for a function task(seed, ...), which it lacks")
        rows = self._rows(module.train, "train")
        if hasattr(module, "evaluation"):
            train = rows
            evaluation = self._rows(module.evaluation, "evaluation")
        else:
            held_out = [is_held_out(identity(row)) for row in rows]
            train = [row for row, out in zip(rows, held_out, strict=True) if not out]
            evaluation = [row for row, out in zip(rows, held_out, strict=True) if out]
            refuse_empty_side(self.name, train, evaluation, "the name evaluation in the file, rows to evaluate on")
        rewards = getattr(module, "rewards", [])
        functions = [load_reward(reward) for reward in (rewards if isinstance(rewards, list | tuple) else [rewards])]
        if not functions and rollout is None:
            raise EstuneError(f"task {self.name}: rewards is empty; name at least one function")
        weights = list(getattr(module, "weights", [1.0] * len(functions)))
        accuracy = getattr(module, "accuracy", reward_name(functions[0]) if functions else None)
        if rollout is not None:
            functions, weights, accuracy = with_rollout(functions, weights, accuracy)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=functions,
            reward_weights=weights,
            accuracy=accuracy,
            gold=getattr(module, "gold", None),
            chat=getattr(module, "chat", None),
            rollout=rollout,
        )

    def _rollout(self, module: ModuleType) -> Rollout | None:
        """The rollout that plays the rows: the file's, or the option `program`."""
        players: dict[Kind, Any] = {
            "program": None if self.program is None else by_program(self.program).target,
            "function": getattr(module, "rollout", None),
            "environment": getattr(module, "Environment", None),
        }
        found = [(kind, player) for kind, player in players.items() if player is not None]
        if len(found) > 1:
            raise EstuneError(
                f"task {self.name}: {' and '.join(kind for kind, _ in found)} would both play its rows; leave out one"
            )
        chat = next((c for c in (self.chat, getattr(module, "chat", None)) if c is not None), True)
        return Rollout(*found[0], chat=chat) if found else None

    def _rows(self, given: str | Iterable[Any], what: str) -> list[Row]:
        rows = load_records(given, what) if isinstance(given, str) else [dict(row) for row in islice(given, None)]
        bad = next((number for number, row in enumerate(rows) if not row.get("prompt")), None)
        if bad is not None:
            raise EstuneError(f"task {self.name}: {what} row {bad} has no prompt; give it text, or messages")
        folder = folder_of(given) if isinstance(given, str) else None
        return with_pictures(whole_rows(rows, f"task {self.name}: {what}"), f"task {self.name}: {what} row", folder)

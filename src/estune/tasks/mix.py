"""Several tasks in one run: mixed by weight, or in stages, as in a curriculum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from estune.grading.convention import RewardFunction, Row, is_async, reward_name
from estune.grading.isolation import isolate, isolation_of
from estune.grading.level import level_of, refuse_level
from estune.rewards.text import as_text
from estune.tasks.base import Stage, Task
from estune.tasks.kinds import AnyTask
from estune.tasks.options import TaskOptions

LABEL = "task"
"""The column that says which task a row is of."""


class StageConfig(BaseModel):
    """Part of a curriculum: what is mixed, and until when."""

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, float] = Field(description="share of each task, by its label; those left out have none")
    until_step: int | None = Field(None, ge=1, description="the step at which the next stage begins")
    until_accuracy: dict[str, float] = Field(
        default_factory=dict, description="held-out accuracies, by label, at which the next stage begins, all reached"
    )


class MixConfig(TaskOptions):
    """Options of a mix: tasks under labels of your choice, and how much of each."""

    summary: ClassVar[str] = "several tasks, mixed by weight or in stages"
    usual_data: ClassVar[str] = "its tasks'"

    name: Literal["mix"] = Field("mix", description="the task")
    tasks: dict[str, AnyTask] = Field(
        default_factory=dict,
        description="the tasks: task.tasks.LABEL.name and so on; a label that is a name needs none",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="share of each task, by its label; 1 if not given"
    )
    stages: list[StageConfig] = Field([], description="a curriculum, instead of weights; the last stage does not end")

    @field_validator("tasks", mode="before")
    @classmethod
    def _labels_as_names(cls, tasks: Any) -> Any:
        def section(label: str, task: Any) -> Any:
            return {"name": label, **(task or {})} if task is None or isinstance(task, Mapping) else task

        return {label: section(label, task) for label, task in tasks.items()} if isinstance(tasks, Mapping) else tasks

    @model_validator(mode="after")
    def _check(self) -> MixConfig:
        if not self.tasks:
            raise ValueError("a mix needs tasks: task.tasks.LABEL.name=...")
        if self.stages and self.weights:
            raise ValueError("weights are given, and stages, which have weights of their own: leave out one")
        for weights in (self.weights, *(stage.weights for stage in self.stages)):
            unknown = next((label for label in weights if label not in self.tasks), None)
            if unknown is not None:
                raise ValueError(f"no task of the mix is called {unknown!r}; there are {', '.join(self.tasks)}")
            shares = {**self._ones(), **weights} if weights is self.weights else weights
            if any(weight < 0 for weight in shares.values()) or not any(shares.values()):
                raise ValueError(f"weights {shares}: none may be negative, and one must be more than 0")
        for stage in self.stages[:-1]:
            if stage.until_step is None and not stage.until_accuracy:
                raise ValueError("a stage before the last never ends: give until_step or until_accuracy")
            unknown = next((label for label in stage.until_accuracy if label not in self.tasks), None)
            if unknown is not None:
                raise ValueError(f"until_accuracy: no task of the mix is called {unknown!r}")
        ends = [stage.until_step for stage in self.stages if stage.until_step is not None]
        if any(first >= second for first, second in pairwise(ends)):
            raise ValueError(f"until_step of the stages is {ends}: give each stage a later one")
        return self

    def build(self, seed: int) -> Task:
        """The tasks' rows with a column `task`, and their rewards, each for its own rows.

        `train_size` and `eval_size` are of each task.

        Raises:
            EstuneError: what the tasks raise.
        """
        tasks = {label: options.build(seed) for label, options in self.tasks.items()}
        for label, task in tasks.items():
            refuse_level(task.reward_funcs, f"task mix: {label}", "rows of a mix are of several tasks", "population")
        columns = dict.fromkeys(key for task in tasks.values() for key in _columns(task))
        train = {label: _labelled(label, task.train[: self.train_size], columns) for label, task in tasks.items()}
        rows = [row for part in train.values() for row in part]
        sizes = {label: len(part) for label, part in train.items()}
        stages = [Stage(blend(sizes, stage.weights), stage.until_step, stage.until_accuracy) for stage in self.stages]
        if not stages:
            rows = [rows[i] for i in blend(sizes, {**self._ones(), **self.weights})]
        return Task(
            name=self.name,
            train=rows,
            evaluation=[
                row
                for label, task in tasks.items()
                for row in _labelled(label, task.evaluation[: self.eval_size], columns)
            ],
            reward_funcs=[only_for(label, task, f) for label, task in tasks.items() for f in task.reward_funcs],
            reward_weights=[weight for task in tasks.values() for weight in task.reward_weights],
            accuracy=[f"{label}/{name}" for label, task in tasks.items() for name in task.accuracies] or None,
            gold=lambda row: gold(row) if (gold := tasks[row[LABEL]].gold) else None,
            group=LABEL,
            show=lambda row, template: tasks[row[LABEL]].shown(row, template=template),
            stages=stages,
        )

    def _ones(self) -> dict[str, float]:
        return dict.fromkeys(self.tasks, 1.0)


def blend(sizes: Mapping[str, int], weights: Mapping[str, float]) -> list[int]:
    """Indices of rows, which lie one task after another, some repeated so that each task has its share.

    They are as few as hold every row of each task that has a share at least once.
    """
    total = sum(weights.values())
    shares = {label: weight / total for label, weight in weights.items() if weight > 0}
    length = max(sizes[label] / share for label, share in shares.items())
    found: list[int] = []
    first = 0
    for label, size in sizes.items():
        found.extend(first + i % size for i in range(round(length * shares.get(label, 0.0))))
        first += size
    return found


def _columns(task: Task) -> list[str]:
    """Columns of either set."""
    return list(dict.fromkeys(key for rows in (task.train, task.evaluation) for row in rows[:1] for key in row))


def _labelled(label: str, rows: Sequence[Row], columns: Mapping[str, Any]) -> list[Row]:
    return [{**{key: row.get(key) for key in columns}, LABEL: label} for row in rows]


@dataclass
class Only:
    """A reward function of one task of a mix: None for the rows of others.

    Args:
        label: the task's.
        function: called with the task's own rows and columns.
        columns: the task's columns beside prompt.
        chat: whether the task's prompts are conversations, and completions therefore messages.
    """

    label: str
    function: RewardFunction
    columns: tuple[str, ...]
    chat: bool

    @property
    def __name__(self) -> str:
        return f"{self.label}/{reward_name(self.function)}"

    @property
    def share(self) -> bool:
        """Whether the function declares that its scores lie in 0 to 1."""
        return getattr(self.function, "share", False) is True

    def __call__(self, *, task: Sequence[str], **given: Any) -> list[float | None]:
        """The function's values for its own rows."""
        own = self._own(task)
        return self._values(self.function(**self._arguments(own, len(task), given)) if own else [], own, len(task))

    def prepare(self) -> None:
        """Prepare the function, which may want something done before it is first called."""
        getattr(self.function, "prepare", lambda: None)()

    def worthless(self, row: Row) -> list[str]:
        """Completions to which the function must not give full marks, for a row of its own."""
        of_function: Callable[[Row], list[str]] = getattr(self.function, "worthless", lambda _: [])
        return of_function(row) if row[LABEL] == self.label else []

    def applies(self, columns: Mapping[str, Sequence[Any]]) -> bool:
        """Whether any of these rows is the task's; if none is, a grader need not be asked."""
        return bool(self._own(columns[LABEL]))

    def _own(self, task: Sequence[str]) -> list[int]:
        return [i for i, label in enumerate(task) if label == self.label]

    def _arguments(self, own: list[int], size: int, given: dict[str, Any]) -> dict[str, Any]:
        texts = [given["completions"][i] for i in own]
        if self.chat:
            texts = [[{"role": "assistant", "content": as_text(text)}] for text in texts]
        chosen = {
            key: [given[key][i] for i in own] for key in ("prompts", "completion_ids", *self.columns) if key in given
        }
        more: dict[str, Any] = {key: given[key] for key in ("trainer_state", "log_metric") if key in given}
        if "log_extra" in given:
            more["log_extra"] = lambda name, values: given["log_extra"](name, self._spread(values, own, size))
        return {**chosen, **more, "completions": texts if self.chat else [as_text(text) for text in texts]}

    def _values(self, returned: Any, own: list[int], size: int) -> list[Any]:
        """What a function returned for its own rows, laid out over all rows; a corpus-level value is repeated."""
        if own and level_of(self.function) == "corpus":
            returned = [returned] * len(own)
        return self._spread(returned, own, size)

    @staticmethod
    def _spread(values: Sequence[Any], own: list[int], size: int) -> list[Any]:
        if len(values) != len(own):
            return list(values)  # too few or too many, as the caller will say
        at = dict(zip(own, values, strict=True))
        return [at.get(i) for i in range(size)]


class OnlyAsync(Only):
    """The same for a function that is `async`."""

    async def __call__(self, *, task: Sequence[str], **given: Any) -> list[float | None]:  # type: ignore[override]
        """The function's values for its own rows."""
        own = self._own(task)
        values = await self.function(**self._arguments(own, len(task), given)) if own else []
        return self._values(values, own, len(task))


def only_for(label: str, task: Task, function: RewardFunction) -> Only:
    """A task's reward function for the rows that bear its label, waited for and isolated as the function is."""
    kind = OnlyAsync if is_async(function) else Only
    columns = tuple(key for key in _columns(task) if key != "prompt")
    wrapped = kind(label, function, columns, not isinstance(task.train[0]["prompt"], str))
    limits = isolation_of(function)
    return isolate(wrapped, limits) if limits else wrapped

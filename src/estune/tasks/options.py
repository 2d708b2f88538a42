"""What the options of all tasks have in common: names and sizes, where data come from, and how prompts are shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from math import inf
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from estune.charts.words import amount
from estune.completion import Prompt
from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.text import as_text, spelled
from estune.tasks.base import Task, refuse_overlap
from estune.tasks.pictures import pictures_of, with_pictures
from estune.tasks.records import Record, folder_of, load_records

log = logging.getLogger(__name__)

HELD_OUT_FRACTION = 0.125
"""Share of a data set that is held out where no evaluation data are given. It defines the data: never change it."""

ToRows = Callable[[str, Sequence[Record]], Iterable[Row]]
"""Makes rows of a source's name and its records."""


def _typed(value: Any) -> Any:
    """Options, and those in their sections, with the values that their texts spell."""
    return {key: _typed(item) for key, item in value.items()} if isinstance(value, Mapping) else spelled(value)


OwnOptions = Annotated[dict[str, Any], AfterValidator(_typed)]
"""What a library's own generators, games or environments take, as `task.options.KEY=VALUE`."""


class TaskOptions(BaseModel):
    """Options of any task."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    summary: ClassVar[str] = ""
    usual_data: ClassVar[str] = ""

    name: str = Field(description="the task")
    train_size: int | None = Field(None, ge=1, description="training rows; all that there are, if not given")
    eval_size: int | None = Field(None, ge=1, description="held-out rows; all that there are, if not given")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_switch(cls, info.field_name or "", value)
        return value

    def build(self, seed: int) -> Task:
        """The task itself.

        Args:
            seed: the run's, for data that are generated.

        Raises:
            EstuneError: data that is missing, malformed or overlapping.
        """
        raise NotImplementedError

    def _split(self, rows: Iterable[Row], held_out: Callable[[Row], bool]) -> tuple[list[Row], list[Row]]:
        """Both sets of one data set, as large as the settings say.

        Raises:
            EstuneError: one is empty.
        """
        train: list[Row] = []
        evaluation: list[Row] = []
        sizes = (self.train_size or inf, self.eval_size or inf)
        for row in rows:
            side, size = (evaluation, sizes[1]) if held_out(row) else (train, sizes[0])
            if len(side) < size:
                side.append(row)
            if (len(train), len(evaluation)) == sizes:
                break
        refuse_empty_side(self.name, train, evaluation, "task.eval_data, rows to evaluate on")
        return train, evaluation


class PromptOptions(TaskOptions):
    """Options of a task whose prompts can be shown as a conversation or as plain text."""

    chat: bool = Field(True, description="prompts as a conversation, for the chat template; false: as plain text")
    system_prompt: str | None = Field(None, description="what the model is told before each prompt")

    def prompt(self, text: str) -> Prompt:
        """A question in the form that the options want: messages, or one string."""
        if not self.chat:
            return f"{self.system_prompt}\n\n{text}" if self.system_prompt else text
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, {"role": "user", "content": text}]

    def show(self, row: Row, template: bool) -> Prompt:
        """What a model is shown for a row whose prompt is text: a conversation, if options and template allow one."""
        text: str = row["prompt"]
        if not self.chat:
            return text
        return self.prompt(text) if template else self.model_copy(update={"chat": False}).prompt(text)


class DataOptions(PromptOptions):
    """Options of a task whose rows come from files or the hub."""

    data: str | None = Field(None, description="file, directory or hub id (ID:CONFIG if it has several)")
    split: str = Field("train", description="split of `data`, where it has several")
    eval_data: str | None = Field(
        None,
        description="as `data`, to evaluate on; several with commas between; if not given, an eighth of `data` is held "
        "out, by a hash of each prompt",
    )
    eval_split: str = Field("test", description="split of `eval_data`, where it has several")
    drop_overlap: bool = Field(
        False, description="leave training rows out that are held-out rows too, instead of refusing them"
    )

    def sources(self) -> tuple[tuple[str, str], list[tuple[str, str]]]:
        """Source and split to train on, and those to evaluate on (none: hold out a part).

        Raises:
            EstuneError: no data is given.
        """
        if not self.data:
            raise EstuneError(f"task {self.name}: no data; give task.data, a file, a directory or a hub id")
        names = [name.strip() for name in (self.eval_data or "").split(",") if name.strip()]
        return (self.data, self.split), [(name, self.eval_split) for name in names]

    def read(self, to_rows: ToRows) -> tuple[list[Row], list[Row]]:
        """Both sets, cut to their sizes; `eval_size` rows of each evaluation set.

        Raises:
            EstuneError: data that is missing, malformed or overlapping.
        """
        (source, split), others = self.sources()
        rows = iter(to_rows(source, pictured(source, load_records(source, split))))
        if not others:
            return self._split(rows, lambda row: is_held_out(identity(row)))
        evaluation: list[Row] = []
        for name, part in others:
            evaluation.extend(islice(to_rows(name, pictured(name, load_records(name, part))), self.eval_size))
        held_out = {identity(row) for row in evaluation}
        train = list(islice((r for r in rows if not self.drop_overlap or identity(r) not in held_out), self.train_size))
        refuse_overlap(self.name, map(identity, train), map(identity, evaluation))
        return train, evaluation


def pictured(source: str, records: Sequence[Record]) -> list[Record]:
    """Records of a data set with their pictures read."""
    return with_pictures(records, f"data {source}: row", folder_of(source))


def refuse_empty_side(name: str, train: Sequence[Row], evaluation: Sequence[Row], remedy: str) -> None:
    """Refuse a split by hash that leaves a set empty, as it may of few rows.

    Args:
        name: the task's.
        train, evaluation: the rows of both sides.
        remedy: what else to give than more rows.

    Raises:
        EstuneError: one of them has no row, and the other has.
    """
    if bool(train) != bool(evaluation):
        side, found = ("evaluation", "none") if train else ("training", "every one")
        raise EstuneError(
            f"task {name}: the {side} set is empty: an eighth of the rows is held out, chosen by a hash of each, and "
            f"of {amount(len(train) + len(evaluation), 'rows')} {found} is; give more rows, or {remedy}"
        )


def identity(row: Row) -> str:
    """A text that is the same for equal examples: the prompt without system prompt, in lower case and single spaces.

    A conversation has a line for each turn, and so has each picture.
    """
    prompt = row["prompt"]
    turns = [] if isinstance(prompt, str) else [turn for turn in prompt if turn.get("role") != "system"]
    texts = [as_text([turn]) for turn in turns] or [as_text(prompt)]
    return "\n".join(" ".join(text.lower().split()) for text in [*texts, *pictures_of(row)])


def is_held_out(text: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether an example belongs to evaluation: a pure function of its text."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def refuse_switch(model: type[BaseModel], name: str, value: Any) -> None:
    """Refuse true and false for a number: Python's booleans are integers, and pydantic takes them.

    Raises:
        ValueError: true or false for a field that is no switch.
    """
    if isinstance(value, bool) and name in model.model_fields and not _is_switch(model.model_fields[name].annotation):
        raise ValueError(f"{name} is no switch: it needs a value other than true or false")


def _is_switch(annotation: Any) -> bool:
    return annotation is bool or bool in get_args(annotation)


def text_of(record: Record, column: str, where: str) -> str:
    """A column's text.

    Raises:
        EstuneError: it holds something else, or nothing.
    """
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise EstuneError(f"{where}: {column} is {value!r:.80}; give text")
    return value

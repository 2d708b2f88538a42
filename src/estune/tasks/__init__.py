"""Tasks: data, prompt format and rewards under one name. Importing this loads neither torch nor datasets."""

from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Tag

from estune.errors import EstuneError
from estune.tasks.base import Stage, Task, data_hash
from estune.tasks.countdown import CountdownConfig
from estune.tasks.kinds import DEFAULT, Alone, kind_of, named, tag_of
from estune.tasks.kinds import KINDS as _ALONE
from estune.tasks.mix import MixConfig
from estune.tasks.options import TaskOptions

KINDS: dict[str, type[TaskOptions]] = {**_ALONE, "mix": MixConfig}
"""The options of each task, by its name or by the form of its names."""

TaskConfig = Annotated[
    Annotated[MixConfig, Tag("<mix>")] | Alone,
    Discriminator(tag_of),
    BeforeValidator(lambda value: named(value, KINDS)),
]
"""Options of any task, told apart by `name`."""

__all__ = [
    "DEFAULT",
    "KINDS",
    "CountdownConfig",
    "Stage",
    "Task",
    "TaskConfig",
    "TaskOptions",
    "catalogue",
    "data_hash",
    "options_of",
]


def catalogue() -> list[tuple[str, str, str]]:
    """Name, what it is, and the data it uses if no others are given, of every task."""
    return [(name, options.summary, options.usual_data) for name, options in KINDS.items()]


def options_of(task: str) -> type[TaskOptions]:
    """The options of the task of this name.

    Raises:
        EstuneError: there is none.
    """
    try:
        named(task, KINDS)
    except ValueError as error:
        raise EstuneError(str(error)) from error
    return KINDS[kind_of(task)]

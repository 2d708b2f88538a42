"""Commands that list what there is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def tasks() -> None:
    """List the tasks, and the data that each uses if no others are given."""
    from estune.tasks import catalogue

    table = Table("task", "what it is", "data", title="tasks of estune train --task")
    for row in catalogue():
        table.add_row(*row)
    Console(markup=False).print(table)


def settings(
    task: Annotated[str, typer.Option(help="list this task's options; `estune tasks` lists the tasks")] = "countdown",
) -> None:
    """List every setting with its default."""
    from estune.config import Config
    from estune.tasks import options_of

    table = Table("setting", "default", "what it is", title="settings of estune train")
    for prefix, fields in (("", Config.model_fields), ("task.", options_of(task).model_fields)):
        for name, field in fields.items():
            if name != "task":
                table.add_row(prefix + name, str(field.get_default(call_default_factory=True)), field.description)
    Console().print(table)

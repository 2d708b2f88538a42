"""Commands that list what there is, and the help that lists settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from estune.cli.output import say, say_table


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
    """List every setting with its default, in sections, and the options of a task."""
    from estune.tasks import options_of

    options = options_of(task)
    _say_sections()
    _say_settings(f"Task {task}: {options.summary}", options.model_fields, "task.")


class WithSettings(TyperCommand):
    """A command whose help lists the settings too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the usual help, then the settings in sections."""
        super().format_help(ctx, formatter)
        _say_sections()
        say(
            "\n`estune settings --task NAME` lists the options of a task, --task.OPTION. The embedded model brings "
            "other defaults: `estune train --dry-run` shows what a run would use."
        )


def _say_sections() -> None:
    from estune.config import SECTIONS

    for section in SECTIONS:
        _say_settings(f"{section.__name__}: {section.__doc__}", section.model_fields)


def _say_settings(title: str, fields: Mapping[str, Any], prefix: str = "") -> None:
    rows = [["setting", "default", "what it is"]]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        rows.append([f"--{prefix}{name}", _as_given(default), field.description or ""])
    say_table(rows, names=2, title=title, remarks=True)


def _as_given(value: Any) -> str:
    """A value as it would be given on the command line; empty for None."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    shown = str(getattr(value, "name", value))
    return "" if value is None else shown.lower() if isinstance(value, bool) else shown

"""Options that several commands have, and settings given as options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from estune.errors import EstuneError

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML or TOML file of settings")]

AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes", help="take the model's configuration and tokenizer and the task's code as they are now"
    ),
]
TrustTask = Annotated[
    bool, typer.Option("--trust-task", help="run the code that the run's journal names; read it first")
]


def overrides_of(arguments: list[str]) -> list[str]:
    """`--key value`, `--key=value` and `key=value` as `key=value`; a switch alone, `--key`, as `key`."""
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if "=" in argument:
            overrides.append(argument.removeprefix("--"))
        elif argument.startswith("--") and rest and not rest[0].startswith("--"):
            overrides.append(f"{argument.removeprefix('--')}={rest.pop(0)}")
        elif argument.startswith("--"):
            overrides.append(argument.removeprefix("--"))
        else:
            raise EstuneError(f"unexpected argument {argument!r}: give settings as --key value")
    return overrides


def listed(text: str | None) -> list[str] | None:
    """The values of an option that takes several, with commas between; None if it was not given."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]

"""The command that trains a run again, by its journal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from estune.config import Config, load, parse
from estune.errors import EstuneError
from estune.journal.diff import flatten
from estune.journal.journal import Journal

NOT_REPEATED = {"output_dir"}
TASK = "task.name"


def own_task(journal: Journal) -> bool:
    """Whether the task is one of the user's own, which settings do not name."""
    task = journal.settings.get("task")
    return isinstance(task, dict) and journal.header.task != task.get("name")


def train_command(journal: Journal, output: str) -> str:
    """A command that trains with the run's settings, into another directory, `output`.

    Where no option can express one of them, it writes them to a file first.
    """
    defaults = defaults_of(journal)
    settings = flatten(journal.settings)
    into = f"--output-dir {shlex.quote(output)}"
    changed = {
        name: value
        for name, value in settings.items()
        if name not in {*NOT_REPEATED, TASK} and (name not in defaults or defaults[name] != value)
    }
    task = {"task": settings[TASK]} if TASK in settings else {}  # whose defaults these are
    options = {name: show(value) for name, value in (task | changed).items()}
    if not _gives(settings, options):
        text = yaml.safe_dump({k: v for k, v in journal.settings.items() if k not in NOT_REPEATED}, sort_keys=False)
        return f"cat > settings.yaml <<'END'\n{text}END\nestune train --config settings.yaml {into}"
    given = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in options.items()]
    return " \\\n    ".join(["estune train", *given, into])


def defaults_of(journal: Journal) -> dict[str, Any]:
    """Settings of a run with this model and task of which nothing else was said, those of the task as `task.NAME`."""
    settings = journal.settings
    task = settings.get("task")
    given = {"model": settings.get("model", "tiny")}
    for more in ({"task": {"name": task.get("name")}} if isinstance(task, dict) else {}, {}):
        try:
            config: Config = parse(given | more)
        except EstuneError:  # the embedded model's settings need not fit another task
            continue
        plain = flatten(config.model_dump(mode="json"))
        standard = Config.model_fields["model"].default
        return plain | {"model": standard}
    return {}


def _gives(settings: Mapping[str, Any], options: Mapping[str, str]) -> bool:
    """Whether these options, read back, are the settings."""
    if any(value.startswith("--") for value in options.values()):
        return False  # would be read as the next option
    try:
        found = flatten(load(None, [f"{name}={value}" for name, value in options.items()]).model_dump(mode="json"))
    except EstuneError:
        return False
    return all(found.get(name) == value for name, value in settings.items() if name not in NOT_REPEATED)


def show(value: Any) -> str:
    """A setting's value as an option takes it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case [int() as low, int() as high]:
            return f"{low}-{high}"
        case list():
            return ",".join(map(str, value)) or "none"
        case float():
            return f"{value!r}"
        case _:
            return str(value)

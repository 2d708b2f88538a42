"""A run's settings against the defaults, and the commands that make it again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from estune.config import Config, load, parse
from estune.errors import EstuneError
from estune.study.report.runs import Run, flatten, show

NOT_REPEATED = {"output_dir"}


@dataclass(frozen=True)
class Setting:
    """A setting, its value in the run and its default."""

    name: str
    value: str
    default: str

    @property
    def changed(self) -> bool:
        """Whether the run departs from the default."""
        return self.value != self.default


@dataclass(frozen=True)
class Command:
    """A command line, and what it is for."""

    what: str
    line: str


def settings_table(run: Run) -> list[Setting]:
    """All settings of a run, those that are not the defaults first."""
    defaults = _defaults(run)
    rows = [
        Setting(name, show(value), show(defaults[name]) if name in defaults else "")
        for name, value in run.settings.items()
        if name not in NOT_REPEATED
    ]
    return sorted(rows, key=lambda row: not row.changed)


def commands(run: Run) -> list[Command]:
    """Train again, rebuild from the journal, evaluate."""
    path = shlex.quote(str(run.path))
    return [
        Command("Train it again", _train(run)),
        Command(
            "Rebuild its last weights from base model and journal; written only if the fingerprint is right",
            f"estune replay {path} -o {shlex.quote(run.label.replace('/', '-') + '-rebuilt')}",
        ),
        Command("Evaluate its best checkpoint again", f"estune eval {path}"),
    ]


def own_task(run: Run) -> bool:
    """Whether the task is one of the user's own, which settings do not name."""
    task = run.journal.settings.get("task")
    return isinstance(task, dict) and run.journal.header.task != task.get("name")


def _train(run: Run) -> str:
    """Options that give these settings; where no option can express one, the settings as a file."""
    defaults = _defaults(run)
    output = f"--output-dir {shlex.quote(run.label.replace('/', '-') + '-again')}"
    changed = {
        name: value
        for name, value in run.settings.items()
        if name not in NOT_REPEATED and (name not in defaults or defaults[name] != value)
    }
    options = {name: show(value) for name, value in changed.items()}
    if not _gives(run, options):
        text = yaml.safe_dump({k: v for k, v in run.journal.settings.items() if k not in NOT_REPEATED}, sort_keys=False)
        return f"cat > settings.yaml <<'END'\n{text}END\nestune train --config settings.yaml {output}"
    given = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in options.items()]
    return " \\\n    ".join(["estune train", *given, output])


def _gives(run: Run, options: dict[str, str]) -> bool:
    """Whether these options, read back, are the run's settings."""
    if any(value.startswith("--") for value in options.values()):
        return False  # would be read as the next option
    try:
        found = flatten(load(None, [f"{name}={value}" for name, value in options.items()]).model_dump(mode="json"))
    except EstuneError:
        return False
    return all(found.get(name) == value for name, value in run.settings.items() if name not in NOT_REPEATED)


def _defaults(run: Run) -> dict[str, Any]:
    """Settings of a run with this model and task of which nothing else was said."""
    settings = run.journal.settings
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

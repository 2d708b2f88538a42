"""A run's settings beside the defaults, and the commands that make the run again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import yaml

from estune.run.recipe import NOT_REPEATED, defaults_of, show, train_command
from estune.study.report.runs import Run


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
    """All settings of a run, those that differ from the defaults first."""
    defaults = defaults_of(run.journal)
    rows = [
        Setting(name, show(value), show(defaults[name]) if name in defaults else "")
        for name, value in run.settings.items()
        if name not in NOT_REPEATED
    ]
    return sorted(rows, key=lambda row: not row.changed)


def settings_file(run: Run) -> str:
    """All settings as a file for `--config`."""
    return yaml.safe_dump(run.journal.settings, sort_keys=False)


def commands(run: Run) -> list[Command]:
    """The commands to train again, to rebuild from the journal, and to evaluate."""
    path = shlex.quote(str(run.path))
    return [
        Command("Train it again", train_command(run.journal, f"{run.label.replace('/', '-')}-again")),
        Command(
            "Rebuild its last weights from base model and journal; written only if the fingerprint is right",
            f"estune replay {path} -o {shlex.quote(run.label.replace('/', '-') + '-rebuilt')}",
        ),
        Command("Evaluate its best checkpoint again", f"estune eval {path}"),
    ]

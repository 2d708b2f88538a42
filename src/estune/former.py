"""Module paths that the documentation once named: importing one gives the module that has taken its place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "estune.commands": "estune.run.evaluate",
    "estune.compare": "estune.study.compare",
    "estune.compare.measure": "estune.study.compare.measure",
    "estune.compare.plan": "estune.study.compare.plan",
    "estune.compare.run": "estune.study.compare.run",
    "estune.compare.train": "estune.study.compare.train",
    "estune.engines.base": "estune.completion",
    "estune.monitors": "estune.run.monitors",
    "estune.monitors.base": "estune.run.monitors.base",
    "estune.probe": "estune.study.probe",
    "estune.replay": "estune.journal.replay",
    "estune.report": "estune.study.report",
    "estune.rewards.isolation": "estune.grading.isolation",
    "estune.rewards.sandbox": "estune.grading.sandbox",
    "estune.sweep": "estune.study.sweep",
    "estune.sweep_report": "estune.study.sweep_report",
}


class Finder:
    """Finds the modules of `MOVED`, and warns of each."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A module's spec, if it has moved."""
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Nothing: the usual kind of module will do until it is replaced."""

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of this one, as the import system lets a module do."""
        name = module.__name__
        warnings.warn(f"{name} is {MOVED[name]} now: import it from there", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(MOVED[name])


def install() -> None:
    """Let imports find these paths before they look for a file."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())

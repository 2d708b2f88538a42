"""The runs of a report, and which of them are the same but for chance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from estune.errors import EstuneError
from estune.journal.diff import flatten
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord
from estune.run.directory import RunDirectory
from estune.run.recipe import show
from estune.study.report.tables import Row, read_rows, score_column

CHANCE_OR_PLACE = {
    "model",  # compared by the content hash instead
    "seed",
    "output_dir",
    "replicas",
    "threads",
    "batch_size",
    "workers",
    "workers_per_gpu",
    "ray_address",
    "worker_timeout",
    "save_steps",
    "save_dtype",
    "log_completions",
    "report_to",
}
"""Settings in which runs of a group may differ: the seed, and those that do not change what is learned."""

MACHINE = {"processor": "{}", "cores": "{} cores", "memory": "{:.1f} GB of memory", "device": "weights on {}"}
"""Keys of `machine.json`, and their names on the page. Memory is in bytes."""
LARGEST = 1e100
SMALLEST = 1e-100
"""Bounds of what is drawn: beyond them, sums and squares of a journal's numbers would overflow, or vanish."""


@dataclass(frozen=True)
class Run:
    """A run as the report sees it."""

    path: Path
    label: str
    index: int
    journal: Journal

    @property
    def directory(self) -> RunDirectory:
        """The run's paths."""
        return RunDirectory(self.path)

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.journal.steps)

    @property
    def planned(self) -> int:
        """Steps that its settings ask for."""
        return int(self.journal.settings.get("steps", self.done))

    @property
    def state(self) -> str:
        """How far the run is."""
        missing = self.journal.shortfall()
        ended = self.journal.ended or "finished"
        return missing or f"{ended} after {self.done}{'' if self.done == self.planned else f' of {self.planned}'} steps"

    @property
    def first(self) -> EvaluationRecord | None:
        """Its first evaluation."""
        return self.journal.evaluations[0] if self.journal.evaluations else None

    @property
    def last(self) -> EvaluationRecord | None:
        """Its last evaluation."""
        return self.journal.evaluations[-1] if self.journal.evaluations else None

    @property
    def best(self) -> EvaluationRecord | None:
        """Its best evaluation, as training chose it."""
        return self.journal.best

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its settings, those of the task as `task.NAME`."""
        return flatten(self.journal.settings)

    @cached_property
    def evaluated(self) -> dict[int, list[Row]]:
        """Completions of each evaluation by step, if they were kept and can be read."""
        found = {}
        for evaluation in self.journal.evaluations:
            with suppress(EstuneError):
                found[evaluation.step] = read_rows(self.directory.completions(f"evaluation-{evaluation.step:05d}"))
        return {step: rows for step, rows in found.items() if rows}

    @cached_property
    def accuracy_column(self) -> str | None:
        """The column of these tables whose mean is the accuracy, or None."""
        kept = [e for e in self.journal.evaluations if e.step in self.evaluated]
        return score_column([self.evaluated[e.step] for e in kept], kept) if kept else None

    @property
    def machine(self) -> str:
        """The machine that the run was on, in words; empty if the run does not say."""
        try:
            found = json.loads((self.path / "machine.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        known = {key: found[key] for key in MACHINE if found.get(key)} if isinstance(found, dict) else {}
        memory = known.pop("memory", None)
        if isinstance(memory, (int, float)):
            known = {**known, "memory": memory / 1e9}
        return ", ".join(MACHINE[key].format(value) for key, value in known.items())


@dataclass(frozen=True)
class Group:
    """Runs that are equal but for the seed."""

    index: int
    label: str
    runs: list[Run]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories.

    Raises:
        EstuneError: there is no run, its journal cannot be read, or nothing has happened yet.
    """
    if not paths:
        raise EstuneError("no run to report: give the output directory of `estune train`")
    doubled = next((path for i, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:i]}), None)
    if doubled is not None:
        raise EstuneError(f"{doubled} is given twice: give each run once")
    names = [path.resolve().name for path in paths]
    runs = []
    for index, path in enumerate(paths):
        journal = Journal.read(path)
        journal.steps = [
            replace(s, rewards=[r if r is None else bounded(r) for r in s.rewards], metrics=_drawable(s.metrics))
            for s in journal.steps
        ]
        journal.evaluations = [replace(e, metrics=_drawable(e.metrics)) for e in journal.evaluations]
        if not journal.steps and not journal.evaluations:
            raise EstuneError(f"{path}: no step and no evaluation in its journal yet; wait for the first")
        label = str(path) if names.count(names[index]) > 1 else names[index]
        runs.append(Run(path, label, index, journal))
    return runs


def _drawable(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: bounded(value) for key, value in metrics.items()}


def bounded(value: float) -> float:
    """A figure within the bounds in which it can be drawn and added up."""
    return 0.0 if abs(value) < SMALLEST else max(-LARGEST, min(LARGEST, value))


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs with equal settings but for the seed, named by the settings in which the groups differ."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        header = run.journal.header
        kept = {key: value for key, value in run.settings.items() if key not in CHANCE_OR_PLACE}
        key = json.dumps([header.task, header.base_hash, kept], sort_keys=True)
        by_key.setdefault(key, []).append(run)
    members = list(by_key.values())
    differing = differences([group[0] for group in members])
    labels = []
    for i, group in enumerate(members):
        if len(members) > 1 and 1 <= len(differing) <= 3:
            labels.append(", ".join(f"{key} {values[i]}" for key, values in differing.items()))
        else:
            labels.append(group[0].label if len(group) == 1 else f"{group[0].label} and {len(group) - 1} more")
    return [Group(i, label, group) for i, (label, group) in enumerate(zip(labels, members, strict=True))]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which these runs differ beyond chance and place, with each one's value."""
    columns: list[dict[str, Any]] = []
    for run in runs:
        header = run.journal.header
        columns.append({"trained on": header.task, "base model": header.base_hash, **run.settings})
    keys = [key for key in dict.fromkeys(k for column in columns for k in column) if key not in CHANCE_OR_PLACE]
    rows = {key: [show(column.get(key, "")) for column in columns] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}

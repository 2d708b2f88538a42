"""What a run goes on from: its own journal, or another run's; with which settings, on which task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estune.config import RESUMABLE, Config, parse
from estune.errors import EstuneError
from estune.journal.journal import Header, Journal, base_checkpoint
from estune.tasks.base import Task

RESUME_FROM_PYTHON = "resume it from Python, with Trainer.resume(run, task=...)"


def parent_of(config: Config) -> Journal | None:
    """The journal of the run that a new run is to go on from.

    Raises:
        EstuneError: where that run kept its weights in another way: its steps would not give the same weights here.
    """
    if config.start_from is None:
        return None
    parent = Journal.read(config.start_from)
    parent.warn_of_shortfall()
    for key in ("weights", "rounding", "noise", "train_parameters"):
        if parent.settings[key] != getattr(config, key):
            raise EstuneError(
                f"start_from {config.start_from} was run with {key}={parent.settings[key]}, found "
                f"{getattr(config, key)}: set {key}={parent.settings[key]}"
            )
    base_checkpoint(parent.header, config.model)
    return parent


def resumed(journal: Journal, changed: Mapping[str, Any]) -> Config:
    """The settings to go on with: the run's, with those of `RESUMABLE` that are to change.

    Raises:
        EstuneError: for another setting, or a bad value.
    """
    other = next((key for key in changed if key not in RESUMABLE), None)
    if other is not None:
        raise EstuneError(f"--resume keeps the run's settings, found {other}; only {', '.join(RESUMABLE)} may change")
    settings = {**journal.settings, **changed}
    if "workers" in changed:
        settings["replicas"] = None  # as many as there is room for beside workers, or instead of them
    return parse(settings, str(journal.path))


def task_of(
    run: Path, header: Header, config: Config, remedy: str, *, task: Task | None = None, other_data: bool = False
) -> Task:
    """The task that a run was trained on.

    Args:
        run, header, config: the run, its journal's header, and its settings.
        remedy: what to do where the task is one of the user's own, which settings cannot name.
        task: the user's own, if given.
        other_data: accept other data, which the user asked for.

    Raises:
        EstuneError: where task or data are not the run's.
    """
    name = task.name if task else config.task.name
    if header.task != name:
        raise EstuneError(f"{run} was trained on the task {header.task}, not {name}: if it is your own, {remedy}")
    task = task or config.task.build(config.seed)
    if not other_data and task.data_hash() != header.data_hash:
        raise EstuneError(
            f"{run}: the data of task {name} are not those that the run was trained on; put them back, or, if it is a "
            f"task of your own, {remedy}"
        )
    return task

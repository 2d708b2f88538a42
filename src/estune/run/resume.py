"""What a run goes on from: its own journal, or another run's; with which settings, on which task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.config import RESUMABLE, Config, parse
from estune.errors import EstuneError
from estune.files import clear_leftovers
from estune.journal.identity import refuse_changes
from estune.journal.journal import Journal, base_checkpoint
from estune.journal.replay import holds, refuse_changed_model
from estune.run.code import code_of
from estune.run.directory import RunDirectory
from estune.run.trust import refuse_foreign, remember
from estune.tasks.base import Task
from estune.weights.checkpoint import Checkpoint, check_name, hub_name

RESUME_FROM_PYTHON = (
    "resume it from Python, with Trainer.resume(run, task=...), or with the ESTrainer that began it, by "
    "train(resume_from_checkpoint=True)"
)


@dataclass(frozen=True)
class Past:
    """A run that is to go on: what it was, and with which settings and on which task it goes on."""

    run: RunDirectory
    journal: Journal  # open for writing
    base: Checkpoint
    config: Config
    task: Task
    files: dict[str, str]  # hashes of the model's files, where they are others than before and the user accepts them
    code: dict[str, str]  # of the task's code, likewise


def reopen(
    path: Path, changed: Mapping[str, Any], *, task: Task | None, accept_changes: bool, trust_task: bool
) -> Past:
    """Open a run to go on with it, cleared of what a kill may have left in it.

    Args:
        path: the run's directory.
        changed, task, accept_changes, trust_task: as `Trainer.resume` takes them.

    Raises:
        EstuneError: as `Trainer.resume`, as far as can be told before a model is loaded.
    """
    run = RunDirectory(path)
    journal = Journal.resume(path)
    try:
        config = resumed(journal, changed)
        done = len(journal.steps)
        check_name(config.model)
        insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
        task, code = task_of(journal, config, changed, RESUME_FROM_PYTHON, task=task, **insists)
        base = base_checkpoint(journal.header, config.model)
        files = refuse_changed_model(journal, base.path, accept=accept_changes)
        clear_leftovers(path)
        clear_leftovers(path / "completions")
        if config.steps <= done and _is_whole(run, journal, base):
            raise EstuneError(f"{path}: all {done} steps are done; give --steps above {done} to go on")
    except BaseException:
        journal.close()
        raise
    return Past(run, journal, base, config, task, files, code)


def _is_whole(run: RunDirectory, journal: Journal, base: Checkpoint) -> bool:
    """Whether a run that took all its steps says so and has what it ends with."""
    dtype = journal.header.live_dtype
    done = len(journal.steps)
    return (
        (journal.ended is not None or journal.header.format == 1)
        and holds(run.final, base, journal, dtype, done)
        and (not journal.evaluations or holds(run.best, base, journal, dtype))
    )


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
        theirs = parent.settings.get(key)
        if theirs != getattr(config, key):
            raise EstuneError(
                f"start_from {config.start_from} was run with {key}={theirs}, found {getattr(config, key)}: set "
                f"{key}={theirs}"
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
        if other not in Config.model_fields:
            parse({other: changed[other]}, str(journal.path))  # which says what it is called here
        raise EstuneError(f"--resume keeps the run's settings, found {other}; only {', '.join(RESUMABLE)} may change")
    settings = {**journal.settings, **changed}
    name, commit = hub_name(str(journal.settings.get("model")))
    if commit and changed.get("model") == name and not Path(name).exists():
        settings["model"] = f"{name}@{commit}"  # the one that the run began with
    if "workers" in changed:
        settings["replicas"] = None  # as many as there is room for beside workers, or instead of them
    return parse(settings, str(journal.path))


def task_of(
    journal: Journal,
    config: Config,
    given: Mapping[str, Any],
    remedy: str,
    *,
    task: Task | None = None,
    other_data: bool = False,
    accept_changes: bool = False,
    trust_task: bool = False,
) -> tuple[Task, dict[str, str]]:
    """The task that a run was trained on, and hashes of its code if they are others than the run's.

    Args:
        journal: the run's.
        config, given: its settings, and what the user gave of them.
        remedy: what to do where the task is one of the user's own, which settings cannot name.
        task: the user's own, if given.
        other_data: accept other data, which the user asked for.
        accept_changes: accept another state of the task's code, on which the user insists.
        trust_task: run the code that the journal names, wherever it comes from.

    Raises:
        EstuneError: where task, its code or its data are not the run's, or the journal names code of others.
    """
    run = journal.path.parent
    header = journal.header
    name = task.name if task else config.task.name
    if header.task != name:
        raise EstuneError(f"{run} was trained on the task {header.task}, not {name}: if it is your own, {remedy}")
    has_task = task is not None
    refuse_foreign(str(run), config, given, has_task=has_task, trust=trust_task, accept=accept_changes)
    task = task or config.task.build(config.seed)
    code = code_of(task.reward_funcs, None if has_task else config.task)
    changed = refuse_changes(str(run), journal.code, code, accept=accept_changes or _names_task(given))
    remember(config)
    if not other_data and task.data_hash() != header.data_hash:
        raise EstuneError(
            f"{run}: the data of task {name} are not those that the run was trained on; put them back, or, if it is a "
            f"task of your own, {remedy}"
        )
    return task, changed


def _names_task(given: Mapping[str, Any]) -> bool:
    """Whether the user said which task, and not only changed its options."""
    task = given.get("task")
    return task is not None and (not isinstance(task, Mapping) or "name" in task)

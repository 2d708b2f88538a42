"""What a run goes on from: its own journal, or another run's; with which settings, on which task."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from estune.config import RESUMABLE, Config, parse
from estune.errors import ACCEPT, EstuneError
from estune.files import clear_leftovers
from estune.journal.identity import refuse_changes
from estune.journal.journal import Journal, base_checkpoint
from estune.journal.replay import holds, refuse_changed_model
from estune.run.code import code_of
from estune.run.directory import RunDirectory
from estune.run.trust import refuse_foreign, remember, texts
from estune.tasks.base import Task
from estune.versions import packages
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import check_name, hub_name
from estune.weights.moments import has_moments
from estune.weights.parameters import AUTO
from estune.weights.policies import bits_of

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
    accept_changes: bool = False
    folder: Path = Path()  # that paths in the task's settings are relative to


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
    return Past(run, journal, base, config, task, files, code, accept_changes, task_folder(journal, config, changed))


def _is_whole(run: RunDirectory, journal: Journal, base: Checkpoint) -> bool:
    """Whether a run that took all its steps says so and has what it ends with."""
    dtype = journal.header.save_dtype
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
        if config.start_step is not None:
            raise EstuneError(f"start_step is {config.start_step}, and no start_from says of which run: give it, too")
        return None
    parent = Journal.read(config.start_from, config.start_step)
    if config.start_step is None:
        parent.warn_of_shortfall()
    for key in ("weights", "rounding", "noise", "sigma_scale", "train_parameters"):
        theirs = parent.settings.get(key, {} if key == "sigma_scale" else None)
        everything = key == "train_parameters" and {theirs, config.train_parameters} == {"*", AUTO}  # of a text model
        alike = key == "weights" and bits_of(parent.header.policy) == bits_of(config.weights)
        follows = key == "noise" and config.noise == "auto"
        if theirs != getattr(config, key) and not everything and not alike and not follows:
            raise EstuneError(
                f"start_from {config.start_from} was run with {key}={theirs}, found {getattr(config, key)}: set "
                f"{key}={theirs}"
            )
    if has_moments(record.update for record in parent.history) and not config.adam:
        raise EstuneError(f"start_from {config.start_from} was run with adam, and its moments go on: set adam=true")
    if parent.settings.get("sam_rho") and len(parent.steps) % 2:
        raise EstuneError(
            f"start_from {config.start_from}: after step {len(parent.steps)} its weights are amid a sharpness-aware "
            f"step: give start_step {len(parent.steps) - 1}, say"
        )
    base_checkpoint(parent.header, config.model)
    return parent


def following(config: Config, parent: Journal | None) -> Config:
    """Settings whose noise is that of the run that goes before, if there is one, where they leave it open."""
    if parent is None or config.noise != "auto":
        return config
    return config.model_copy(update={"noise": parent.header.noise})


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
    settings = {**settings_of(journal), "model": journal.base_model(), **changed}
    name, commit = hub_name(str(journal.settings.get("model")))
    if commit and changed.get("model") == name and not Path(name).exists():
        settings["model"] = f"{name}@{commit}"  # the one that the run began with
    if "workers" in changed or "workers_at" in changed:
        settings["replicas"] = None  # as many as there is room for beside workers, or instead of them
    if changed.get("workers_at"):
        settings |= {"workers": None, "workers_per_gpu": 1, "ray_address": None}
    return parse(settings, str(journal.path))


def settings_of(journal: Journal) -> dict[str, Any]:
    """A run's settings; those of a journal that names no date for chat templates with that of the run's beginning."""
    began = journal.header.created[:10]
    with suppress(ValueError):
        return {"template_date": date.fromisoformat(began).isoformat(), **journal.settings}
    return journal.settings


def refuse_changed_prompts(journal: Journal, now: str, *, accept: bool) -> str | None:
    """Refuse prompts that are not, token for token, those that a run began with.

    Args:
        journal: the run's; one without a hash of its prompts is not compared.
        now: the hash of what they are here.
        accept: the user insists on going on.

    Returns:
        The hash to record, if they are others and the user accepts them; None otherwise.

    Raises:
        EstuneError: they are others, with the libraries of which the run had other versions.
    """
    if journal.prompts_hash in ("", now):
        return None
    if not accept:
        before = journal.header.packages
        other = ", ".join(f"{name} {before[name]}" for name, v in packages().items() if before.get(name, v) != v)
        raise EstuneError(
            f"{journal.run}: its prompts come to other tokens here than when the run began, though data, "
            f"tokenizer and chat template are the same; take the libraries that it began with"
            f"{f' ({other})' if other else ''}, or go on with what is there now by {ACCEPT}"
        )
    return now


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
    run = journal.run
    header = journal.header
    name = task.name if task else config.task.name
    if header.task != name:
        raise EstuneError(f"{run} was trained on the task {header.task}, not {name}: if it is your own, {remedy}")
    has_task = task is not None
    with chdir(task_folder(journal, config, given)):
        refuse_foreign(str(run), config, given, has_task=has_task, trust=trust_task, accept=accept_changes)
        task = task or config.task.build(config.seed)
        code = code_of(task.reward_funcs, None if has_task else config.task)
        changed = refuse_changes(str(run), journal.code, code, accept=accept_changes or _names_task(given))
        remember(config)
    if not other_data and not journal.prompts_hash and task.data_hash() != header.data_hash:
        # Before journals had it, text in a task's file was never made a conversation.
        task = replace(task, chat=False, show=None)
    if not other_data and task.data_hash() != header.data_hash:
        raise EstuneError(
            f"{run}: the data of task {name} are not those that the run was trained on; put them back, or, if it is a "
            f"task of your own, {remedy}"
        )
    return task, changed


def task_folder(journal: Journal, config: Config, given: Mapping[str, Any]) -> Path:
    """The directory that paths in the settings of a run's tasks are relative to: where most of them are.

    Args:
        journal: the run's.
        config, given: its settings, and what the user gave of them, whose paths are relative to where he is.
    """
    if _names_task(given):
        return Path.cwd()
    named = texts([options.model_dump(mode="json") for options in (config.task, *config.watch)])
    paths = {re.sub(r"\.py:\w+$", ".py", text) for text in named} - {""}
    return max(journal.folders(), key=lambda folder: sum(os.path.exists(folder / path) for path in paths))


def _names_task(given: Mapping[str, Any]) -> bool:
    """Whether the user said which task, and not only changed its options."""
    task = given.get("task")
    return task is not None and (not isinstance(task, Mapping) or "name" in task)

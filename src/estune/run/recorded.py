"""A run's settings and its task, as its journal has them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import chdir, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.identity import refuse_changes
from estune.journal.journal import Journal
from estune.run.code import code_of
from estune.run.make import make_task
from estune.run.trust import refuse_foreign, remember, texts
from estune.tasks.base import Task

RESUME_FROM_PYTHON = (
    "resume it from Python, with Trainer.resume(run, task=...), or with the ESTrainer that began it, by "
    "train(resume_from_checkpoint=True)"
)


def settings_of(journal: Journal) -> dict[str, Any]:
    """A run's settings; those of a journal that names no date for chat templates with that of the run's beginning."""
    began = journal.header.created[:10]
    with suppress(ValueError):
        return {"template_date": date.fromisoformat(began).isoformat(), **journal.settings}
    return journal.settings


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
        task = task or make_task(config)
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

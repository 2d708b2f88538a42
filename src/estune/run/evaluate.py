"""A run's best checkpoint, or any model, evaluated by itself; and with which settings and task."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any

from estune.charts.words import amount
from estune.config import Config, merge, parse, read
from estune.errors import EstuneError
from estune.journal.journal import Journal, is_run
from estune.journal.replay import refuse_changed_model
from estune.run.directory import find_checkpoint
from estune.run.make import make_task
from estune.run.recorded import settings_of, task_folder, task_of
from estune.run.remarks import of_evaluation
from estune.run.trust import refuse_foreign
from estune.tasks.base import Task

log = logging.getLogger(__name__)


def evaluate_model(
    model: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    output: Path | None = None,
    *,
    task: Task | None = None,
    checkpoint: Path | None = None,
    accept_changes: bool = False,
    trust_task: bool = False,
) -> dict[str, float]:
    """Metrics of a run's best checkpoint, or of a model, on the held-out set and those of the tasks that are watched.

    They are those that training tells of an evaluation, under the same names.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's.
        output: where to write the completions, as parquet; its column `task` tells whose they are.
        task: a task of your own; by default the one the settings name.
        checkpoint: other weights than the run's best, to be evaluated as these are.
        accept_changes: evaluate with the run's code, configuration and tokenizer as they are now, changed or not.
        trust_task: run the code that the run's journal names, which you have not run before.

    Raises:
        EstuneError: where the settings do not give the task and the data that the run was trained on, its journal names
            code of others, or a task has no held-out set.
    """
    from estune.engines.tokenizer import open_encoder
    from estune.pool.open import open_to_generate, with_resources_to_generate
    from estune.pool.waiting import check_model, told_while_generating
    from estune.run.evaluations import Evaluations, named
    from estune.run.graded import write_completions
    from estune.run.held_out import refuse_unreachable

    given = from_here(read(file, overrides or []))
    folder = Path.cwd()
    config = settings_for(model, given)
    run = Path(model)
    if is_run(run):
        journal = Journal.read(run)
        folder = folder if "watch" in given else task_folder(journal, config, given)
        task = task_for(journal, config, given, task, accept_changes=accept_changes, trust_task=trust_task)
        refuse_changed_model(journal, checkpoint or find_checkpoint(model), accept=accept_changes, trained=True)
    else:
        check_model(model)
    task = task or make_task(config)
    adapter = None if is_run(run) or checkpoint else config.adapter  # a run's checkpoint holds it
    config = config.model_copy(update={"adapter": adapter})
    config = with_resources_to_generate(on_this_machine(config, checkpoint or find_checkpoint(model)))
    refuse_unreachable(task, config)
    if not task.evaluation:
        raise EstuneError(f"task {task.name} has no evaluation set: give it one, or another task")
    for remark in of_evaluation(config):
        log.warning("%s", remark)
    metrics = dict[str, float]()
    records = list[dict[str, Any]]()
    with ExitStack() as opened:
        evaluations = Evaluations(task, config, open_encoder(config), folder)
        opened.callback(evaluations.close)
        pool = open_to_generate(config, evaluations.longest)
        opened.callback(pool.close)
        for name, held_out in evaluations:
            asked = held_out.asked
            what = f"completing {amount(len(asked), 'prompts')} of {held_out.task.name}"
            places = len(asked) * config.max_new_tokens
            with told_while_generating(what, pool, sum(map(len, asked)), places):
                found, graded = held_out.evaluate(pool)
            metrics |= named(name, found)
            records += graded.records(task=held_out.task.name)
    if output is not None:
        write_completions(output, records)
    return metrics


def on_this_machine(config: Config, checkpoint: Path | str) -> Config:
    """The settings with a checkpoint, or another name, for the model, and no workers."""
    here: dict[str, Any] = {"model": str(checkpoint), "workers": None}
    if config.workers_at:  # they have the base model, and vLLM, which need not be here
        here |= {"workers_at": [], "engine": "auto", "vllm_max_model_length": None}
    return config.model_copy(update=here)


def from_here(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with the user's own paths of data from the root on: a run's are relative to where it was begun."""
    task = given.get("task")
    if not isinstance(task, dict) or "name" in task:
        return given
    found = {
        key: ",".join(
            os.path.abspath(part.strip()) if os.path.exists(part.strip()) else part for part in value.split(",")
        )
        for key, value in task.items()
        if key in ("data", "eval_data") and isinstance(value, str)
    }
    return {**given, "task": {**task, **found}}


def settings_for(model: str, given: Mapping[str, Any]) -> Config:
    """The settings to generate with: a run's, on a device that this machine has, or the defaults.

    Args:
        model: a run's directory, or a model.
        given: settings on top of these.

    Raises:
        EstuneError: for a journal or settings that cannot be used.
    """
    if not is_run(model):
        return parse({**given, "model": model})
    journal = Journal.read(Path(model))
    journal.warn_of_shortfall()
    settings = settings_of(journal)
    return parse(merge({**settings, "device": _device_of(settings)}, given), model)


def _device_of(settings: Mapping[str, Any]) -> str:
    """The device of a run, or auto where this machine has none like it."""
    from estune.weights.device import chosen_device

    try:
        chosen_device(str(settings.get("device")))
    except EstuneError:
        return "auto"
    return str(settings["device"])


def task_for(
    journal: Journal,
    config: Config,
    given: Mapping[str, Any],
    task: Task | None = None,
    *,
    accept_changes: bool,
    trust_task: bool,
) -> Task:
    """The task of a run, or the one that the user gave instead.

    Args:
        journal: the run's.
        config, given: its settings, and what the user gave of them.
        task: the user's own, whatever the run was trained on.
        accept_changes, trust_task: as `task_of` takes them.

    Raises:
        EstuneError: as `task_of`.
    """
    run = str(journal.run)
    if task is not None:
        with chdir(task_folder(journal, config, given)):
            refuse_foreign(run, config, given, has_task=True, trust=trust_task, accept=accept_changes)
        return task
    remedy = f"evaluate it from Python, with estune.evaluate_model({run!r}, task=...)"
    other_data = not given.keys().isdisjoint(("task", "seed"))
    found, _ = task_of(
        journal,
        config,
        given,
        remedy,
        other_data=other_data,
        accept_changes=accept_changes,
        trust_task=trust_task,
    )
    return found

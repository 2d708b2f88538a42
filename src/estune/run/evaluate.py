"""What the commands do that is not training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estune.config import Config, merge, parse, read
from estune.errors import EstuneError
from estune.journal.journal import FILE, Journal
from estune.run.directory import find_checkpoint
from estune.run.resume import task_of
from estune.tasks.base import Task

if TYPE_CHECKING:
    pass


def evaluate_model(
    model: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    output: Path | None = None,
    *,
    task: Task | None = None,
) -> dict[str, float]:
    """Metrics of a run's best checkpoint, or of a model, on the held-out set and those of the tasks that are watched.

    They are those that training tells of an evaluation, under the same names.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's.
        output: where to write the completions, as parquet; its column `task` tells whose they are.
        task: a task of your own; by default the one the settings name.

    Raises:
        EstuneError: where the settings do not give the task and the data that the run was trained on, or a task has no
            held-out set.
    """
    from estune.engines.loading import open_encoder
    from estune.pool.local import open_local_pool
    from estune.pool.open import with_resources
    from estune.run.graded import write_completions
    from estune.run.held_out import HeldOut

    given = read(file, overrides or [])
    config = _settings_for(model, given)
    task = task or _task_for(model, config, given)
    config = config.model_copy(update={"model": str(find_checkpoint(model)), "workers": None})
    config = with_resources(config, perturbs=False)
    encoder, metrics, records = open_encoder(config), dict[str, float](), list[dict[str, Any]]()
    with ExitStack() as opened:
        held_out = []
        for each in (task, *(options.build(config.seed) for options in config.watch)):
            if not each.evaluation:
                raise EstuneError(f"task {each.name} has no evaluation set: give it one, or another task")
            held_out.append(HeldOut(each, config, encoder))
            opened.callback(held_out[-1].close)
        pool = open_local_pool(config, perturbs=False)
        opened.callback(pool.close)
        for which in held_out:
            found, graded = which.evaluate(pool)
            name = which.task.name
            watched = {f"watch/{name}/{key.removeprefix('eval_')}": value for key, value in found.items()}
            metrics |= found if which is held_out[0] else watched
            records += graded.records(task=name)
    if output is not None:
        write_completions(output, records)
    return metrics


def _settings_for(model: str, given: Mapping[str, Any]) -> Config:
    if not (Path(model) / FILE).is_file():
        return parse({**given, "model": model})
    journal = Journal.read(Path(model))
    journal.warn_of_shortfall()
    settings = journal.settings
    return parse(merge({**settings, "device": _device_of(settings)}, given), model)


def _device_of(settings: Mapping[str, Any]) -> str:
    """The device of a run, or auto where this machine has none like it."""
    from estune.weights.device import chosen_device

    try:
        chosen_device(settings["device"])
    except EstuneError:
        return "auto"
    return str(settings["device"])


def _task_for(model: str, config: Config, given: Mapping[str, Any]) -> Task:
    run = Path(model)
    if not (run / FILE).is_file():
        return config.task.build(config.seed)
    remedy = f"evaluate it from Python, with estune.evaluate_model({model!r}, task=...)"
    other_data = not given.keys().isdisjoint(("task", "seed"))
    return task_of(run, Journal.read(run).header, config, remedy, other_data=other_data)

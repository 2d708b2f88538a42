"""What the commands do that is not training."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from estune.checkpoint import Checkpoint, locate
from estune.config import Config, merge, parse, read
from estune.errors import EstuneError
from estune.journal import FILE, Journal
from estune.replay import base_checkpoint
from estune.run import RESUME_FROM_PYTHON, RunDirectory, default_path, find_checkpoint, refuse_used, task_of
from estune.tasks.base import Task


def evaluate_model(
    model: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    output: Path | None = None,
    *,
    task: Task | None = None,
) -> dict[str, float]:
    """Metrics of a run's best checkpoint, or of a model, on the held-out set.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's.
        output: where to write the completions, as parquet.
        task: a task of your own; by default the one the settings name.

    Raises:
        EstuneError: where the settings do not give the task and the data that the run was trained on.
    """
    from estune.evaluation import evaluation_metrics, grade_completions, write_completions
    from estune.setup import make_sampling, open_pool, with_resources

    given = read(file, overrides or [])
    config = _settings_for(model, given)
    task = task or _task_for(model, config, given)
    config = with_resources(config.model_copy(update={"model": str(find_checkpoint(model))}))
    # Nothing is perturbed, so no replica needs its weights twice.
    replica, pool = open_pool(config.model_copy(update={"weights": "inplace"}))
    try:
        ids = replica.engine.encode([row["prompt"] for row in task.evaluation])
        graded = grade_completions(task, task.evaluation, pool.generate(ids, make_sampling(config)))
    finally:
        pool.close()
    if output is not None:
        write_completions(output, graded.records())
    return evaluation_metrics(task, graded)


def describe(config: Config) -> str:
    """What `estune train` would do with these settings: checks settings, model and data, writes nothing.

    Raises:
        EstuneError: for what `estune train` would refuse, as far as it can be known without reading the weights.
    """
    output = config.output_dir or default_path(config, config.task.name)
    refuse_used(output)
    checkpoint = Checkpoint(locate(config.model))
    elements = sum(t.elements for t in checkpoint.tensors.values())
    task = config.task.build(config.seed)
    _check_weights(config, checkpoint)
    _check_prompts(config, checkpoint, task)
    prompts = min(config.prompts_per_step, len(task.train))
    completions = config.steps * config.population * prompts
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return (
        f"{text}\n"
        f"model {config.model}: {elements:,} parameters in {checkpoint.path}\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows\n"
        f"{config.steps} steps x {config.population} members x {prompts} prompts = {completions:,} completions of at "
        f"most {config.max_new_tokens} tokens\n"
        f"output goes to {output}; nothing has been written"
    )


def describe_rest(run: Path, steps: int | None = None, model: str | None = None) -> str:
    """What `estune train --resume` would do: checks journal, base model and data, writes nothing.

    Args:
        run: the run's directory.
        steps: a new total.
        model: where the base model is now.

    Raises:
        EstuneError: where journal, base model or data are not what the run began with.
    """
    journal = Journal.read(run)
    done = len(journal.steps)
    config = parse(journal.settings if steps is None else {**journal.settings, "steps": steps}, str(journal.path))
    base = base_checkpoint(journal.header, model)
    task = task_of(run, journal.header, config, RESUME_FROM_PYTHON)
    start = next((step for step in RunDirectory(run).checkpoints() if step <= done), 0)
    return (
        f"run {run}: {done} of {config.steps} steps done, {max(0, config.steps - done)} to go\n"
        f"model {base.path}: as the run began\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows, as the run began\n"
        f"begins with {f'checkpoint-{start}' if start else 'the base model'} and replays {done - start} steps\n"
        f"output goes to {run}; nothing has been written"
    )


def _settings_for(model: str, given: Mapping[str, Any]) -> Config:
    if not (Path(model) / FILE).is_file():
        return parse({**given, "model": model})
    return parse(merge(Journal.read(Path(model)).settings, given), model)


def _task_for(model: str, config: Config, given: Mapping[str, Any]) -> Task:
    run = Path(model)
    if not (run / FILE).is_file():
        return config.task.build(config.seed)
    remedy = f"evaluate it from Python, with estune.commands.evaluate_model({model!r}, task=...)"
    other_data = not given.keys().isdisjoint(("task", "seed"))
    return task_of(run, Journal.read(run).header, config, remedy, other_data=other_data)


def _check_weights(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse a device that is not there, a type without kernels, and a pattern that no tensor's name fits."""
    import torch

    from estune.engines.loading import pick_device, pick_dtype
    from estune.weights import as_array

    device = pick_device("cpu" if config.device == "auto" else config.device)
    dtype = pick_dtype(config.dtype, device)
    as_array(torch.zeros(1, dtype=None if isinstance(dtype, str) else dtype, device=device))
    if not any(fnmatchcase(name, config.train_parameters) for name in checkpoint.tensors):
        raise EstuneError(
            f"train_parameters: no tensor's name fits {config.train_parameters!r}; names look like "
            f"{next(iter(checkpoint.tensors))}"
        )


def _check_prompts(config: Config, checkpoint: Checkpoint, task: Task) -> None:
    """Refuse prompts that the tokenizer does not take, or that leave no room for a completion."""
    from transformers import AutoConfig

    from estune.engines.loading import load_tokenizer
    from estune.engines.prompts import PromptEncoder
    from estune.setup import make_sampling

    try:
        model = AutoConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise EstuneError(f"model {config.model}: its config.json cannot be used ({why})") from error
    encoder = PromptEncoder(config.model, load_tokenizer(checkpoint.path), model)
    for rows in (task.evaluation, task.train):
        encoder.check(encoder.encode([row["prompt"] for row in rows]), make_sampling(config))

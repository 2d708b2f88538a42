"""What `estune train` would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import Journal, base_checkpoint
from estune.journal.replay import refuse_changed_model
from estune.run.directory import RunDirectory, default_path, refuse_used
from estune.run.resume import RESUME_FROM_PYTHON, resumed, task_of
from estune.tasks.base import Task
from estune.weights.checkpoint import Checkpoint, locate

if TYPE_CHECKING:
    pass


def describe(config: Config) -> str:
    """What `estune train` would do with these settings: checks settings, model and data, writes nothing.

    Raises:
        EstuneError: for what `estune train` would refuse, as far as it can be known without reading the weights.
    """
    from estune.run.monitors import check_trackers

    output = config.output_dir or default_path(config, config.task.name)
    refuse_used(output)
    check_trackers(config)
    checkpoint = Checkpoint(locate(config.model))
    elements = sum(t.elements for t in checkpoint.tensors.values())
    task = config.task.build(config.seed)
    _check_weights(config, checkpoint)
    _check_prompts(config, task)
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


def describe_rest(
    run: Path, changed: Mapping[str, Any], *, accept_changes: bool = False, trust_task: bool = False
) -> str:
    """What `estune train --resume` would do: checks journal, base model and data, writes nothing.

    Args:
        run: the run's directory.
        changed, accept_changes, trust_task: as `Trainer.resume` takes them.

    Raises:
        EstuneError: where journal, base model or data are not what the run began with.
    """
    journal = Journal.read(run)
    done = len(journal.steps)
    config = resumed(journal, changed)
    base = base_checkpoint(journal.header, config.model)
    refuse_changed_model(journal, base.path, accept=accept_changes)
    insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
    task, _ = task_of(journal, config, changed, RESUME_FROM_PYTHON, **insists)
    start = next((step for step in RunDirectory(run).checkpoints() if step <= done), 0)
    return (
        f"run {run}: {done} of {config.steps} steps done, {max(0, config.steps - done)} to go\n"
        f"model {base.path}: as the run began\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows, as the run began\n"
        f"begins with {f'checkpoint-{start}' if start else 'the base model'} and replays {done - start} steps\n"
        f"output goes to {run}; nothing has been written"
    )


def _check_weights(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse a device that is not there or has no kernels, and a pattern that no tensor's name fits."""
    from estune.weights.device import training_device

    training_device(config.device)
    if not any(fnmatchcase(name, config.train_parameters) for name in checkpoint.tensors):
        raise EstuneError(
            f"train_parameters: no tensor's name fits {config.train_parameters!r}; names look like "
            f"{next(iter(checkpoint.tensors))}"
        )


def _check_prompts(config: Config, task: Task) -> None:
    """Refuse prompts that the tokenizer does not take, or that leave no room for a completion."""
    from estune.engines.loading import open_encoder
    from estune.run.make import make_sampling

    encoder = open_encoder(config)
    for rows in (task.evaluation, task.train):
        encoder.check(encoder.encode([row["prompt"] for row in rows]), make_sampling(config))

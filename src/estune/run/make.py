"""From settings to what a run is made of: task, strategy, grading, sampling."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from estune.completion import Sampling
from estune.config import Config
from estune.es.adam import Adam
from estune.es.earlier import Momentum
from estune.es.evolution import EvolutionStrategy
from estune.es.guided import Guided
from estune.es.schedule import Schedule
from estune.es.sharpness import SharpnessAware
from estune.grading.convention import TrainerState
from estune.grading.grading import Grading
from estune.journal.journal import Journal
from estune.journal.records import Header
from estune.pool.base import Description
from estune.pool.waiting import told_while
from estune.run.order import StagedOrder
from estune.tasks.base import Task
from estune.versions import packages


def make_task(config: Config) -> Task:
    """The settings' task, told of where its data take long, as the hub's may.

    Raises:
        EstuneError: the data cannot be had, or do not fit the task.
    """
    with told_while(f"making the task {config.task.name}"):
        return config.task.build(config.seed)


def make_strategy(config: Config, journal: Journal | None = None) -> EvolutionStrategy:
    """The settings' strategy, where a run's journal ends.

    Args:
        config: the settings.
        journal: of a run that goes on from another, perturbations are to be others than that one's.
    """
    origin = int(journal.header.fingerprint, 16) >> 1 if journal is not None and journal.header.ancestors else 0
    strategy = EvolutionStrategy(
        seed=config.seed ^ origin,
        population=config.population,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        steps=config.steps,
        lr_schedule=Schedule(config.lr_scheduler_type, config.min_lr_rate, config.warmup_steps),
        sigma_schedule=Schedule(config.sigma_scheduler_type, config.min_sigma_rate, config.sigma_warmup_steps),
        shaping=config.shaping,
        shaping_share=config.shaping_share,
        weight_decay=config.weight_decay,
        anchor_decay=config.anchor_decay,
        anchor_l1=config.anchor_l1,
        mirrored=config.mirrored,
        momentum=Momentum(config.momentum, config.momentum_window),
        adam=Adam(config.adam_beta1, config.adam_beta2) if config.adam else None,
        guided=Guided(config.guided_share, config.guided_window) if config.guided_share else None,
        sharpness=SharpnessAware(config.sam_rho) if config.sam_rho else None,
        adapt_sigma=config.adapt_sigma,
        evaluate_base=config.base_takes_part,
        groups=config.prompt_groups,
    )
    if journal is not None:
        recall(strategy, journal)
    return strategy


def recall(strategy: EvolutionStrategy, journal: Journal) -> None:
    """Make a strategy what it is where a run's journal ends."""
    strategy.recall([record.update for record in journal.steps], state_after(journal, len(journal.steps)))


def state_after(journal: Journal, step: int) -> dict[str, float]:
    """A strategy's state after so many of a run's steps."""
    if step:
        return journal.steps[step - 1].state
    begun = sum(record.update.moments is not None for record in journal.inherited)
    return {"adam_steps": float(begun)} if begun else {}  # moments go on from an ancestor's


def settled(config: Config, trained: Description, own_dtype: str) -> Config:
    """Settings with what has become of `auto`; `own_dtype` is the type that checkpoints then have."""
    save_dtype = own_dtype if config.save_dtype == "auto" else config.save_dtype
    return config.model_copy(update={"engine": trained.engine, "save_dtype": save_dtype})


def make_header(
    config: Config, trained: Description, run: Path, fingerprint: str, task: str, data_hash: str = "", **more: Any
) -> Header:
    """The header of a new run's journal.

    Args:
        config: the settings.
        trained: what the pool trains.
        run: the run's directory.
        fingerprint: of the weights that it begins with.
        task, data_hash: the task's name, and the hash of its data.
        more: further fields of the header.
    """
    return Header(
        model=config.model,
        base_hash=trained.base_hash,
        policy=config.weights,
        rounding=config.rounding,
        noise=config.noise_mode,
        dtype=trained.dtype,
        live_dtype=trained.live_dtype,
        tensors=trained.tensors,
        scales=dict(trained.rule.scales),
        group_size=trained.rule.grid.group_size if trained.rule.grid else 0,
        carry_steps=trained.rule.grid.carry_steps if trained.rule.grid else 0,
        fingerprint=fingerprint,
        task=task,
        data_hash=data_hash,
        config=config.model_dump(mode="json"),
        packages=packages(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=trained.files,
        place=os.path.abspath(run),
        folder=os.getcwd(),
        **more,
    )


def make_order(config: Config, task: Task) -> StagedOrder:
    """Which training rows each step of a run uses."""
    return StagedOrder(len(task.train), task.stages, config.prompts_of_step, config.seed, config.steps_in_one)


def make_grading(config: Config, task: Task, state: TrainerState | None = None) -> Grading:
    """What applies a task's rewards, as the settings say."""
    return Grading(
        task.reward_funcs,
        task.reward_weights,
        processes=config.graders,
        deadline=config.reward_timeout,
        errors=config.reward_errors,
        max_errors=config.max_reward_errors,
        state=state or TrainerState(rendering=config.rendering),
    )


def make_sampling(config: Config, seed: int = 0) -> Sampling:
    """The settings' way of drawing completions."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)

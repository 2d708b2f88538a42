"""From settings to what a run is made of: strategy, grading, sampling."""

from __future__ import annotations

from estune.completion import Sampling
from estune.config import Config
from estune.es.strategy import EvolutionStrategy
from estune.grading.convention import TrainerState
from estune.grading.grading import Grading
from estune.tasks.base import Task


def make_strategy(config: Config, origin: str | None = None, step: int = 0) -> EvolutionStrategy:
    """The settings' strategy, after so many steps.

    Args:
        config: the settings.
        origin: for a run that goes on from another, the fingerprint it starts with: its perturbations are to be others.
    """
    strategy = EvolutionStrategy(
        seed=config.seed if origin is None else config.seed ^ int(origin, 16) >> 1,
        population=config.population,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        steps=config.steps,
        schedule=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        mirrored=config.mirrored,
    )
    strategy.step = step
    return strategy


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

"""After which steps a run evaluates and writes a checkpoint, by its settings alone."""

from __future__ import annotations

from estune.config import Config


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether a run evaluates after so many steps; it always does at its end."""
    return step >= config.steps or (_has_come(config, step, config.eval_steps) if step else config.eval_on_start)


def checkpoint_is_due(config: Config, step: int) -> bool:
    """Whether a run writes a checkpoint after so many steps."""
    return step > 0 and _has_come(config, step, config.save_steps)


def _has_come(config: Config, step: int, every: int) -> bool:
    """Whether a multiple of so many steps has come, which may be amid those that belong together."""
    return every > 0 and step // every > (step - config.steps_in_one) // every

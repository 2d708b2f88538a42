"""Full-parameter fine-tuning of language models with Evolution Strategies.

from estune import Config, Trainer

summary = Trainer(Config(steps=50)).train()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from estune import former

if TYPE_CHECKING:
    from estune.config import Config
    from estune.errors import EstuneError
    from estune.es.evolution import EvolutionStrategy
    from estune.es.strategy import Member, Strategy, Update
    from estune.noise import normal
    from estune.run.evaluate import evaluate_model
    from estune.run.parameter_search import Engines, ParameterSearch
    from estune.run.trainer import Trainer
    from estune.tasks.base import Task
    from estune.trl.config import ESConfig
    from estune.trl.trainer import ESTrainer
    from estune.weights.weights import Weights

_HOME = {
    "Config": "config",
    "ESConfig": "trl.config",
    "Engines": "run.parameter_search",
    "ESTrainer": "trl.trainer",
    "EstuneError": "errors",
    "EvolutionStrategy": "es.evolution",
    "Member": "es.strategy",
    "ParameterSearch": "run.parameter_search",
    "Strategy": "es.strategy",
    "Task": "tasks.base",
    "Trainer": "run.trainer",
    "Update": "es.strategy",
    "Weights": "weights.weights",
    "evaluate_model": "run.evaluate",
    "normal": "noise",
}

__all__ = [
    "Config",
    "ESConfig",
    "ESTrainer",
    "Engines",
    "EstuneError",
    "EvolutionStrategy",
    "Member",
    "ParameterSearch",
    "Strategy",
    "Task",
    "Trainer",
    "Update",
    "Weights",
    "evaluate_model",
    "normal",
]
__version__ = "0.1.0"

former.install()


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing the package stays fast and loads no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'estune' has no attribute {name!r}")
    return getattr(import_module(f"estune.{_HOME[name]}"), name)

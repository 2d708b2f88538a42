"""Full-parameter fine-tuning of language models with Evolution Strategies.

from estune import Config, Trainer

summary = Trainer(Config(steps=50)).train()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from estune.config import Config
    from estune.errors import EstuneError
    from estune.es_config import ESConfig
    from estune.es_trainer import ESTrainer
    from estune.noise import normal
    from estune.strategy import EvolutionStrategy, Member, Strategy, Update
    from estune.tasks.base import Task
    from estune.trainer import Trainer
    from estune.weights import Weights

_HOME = {
    "Config": "config",
    "ESConfig": "es_config",
    "ESTrainer": "es_trainer",
    "EstuneError": "errors",
    "EvolutionStrategy": "strategy",
    "Member": "strategy",
    "Strategy": "strategy",
    "Task": "tasks.base",
    "Trainer": "trainer",
    "Update": "strategy",
    "Weights": "weights",
    "normal": "noise",
}

__all__ = [
    "Config",
    "ESConfig",
    "ESTrainer",
    "EstuneError",
    "EvolutionStrategy",
    "Member",
    "Strategy",
    "Task",
    "Trainer",
    "Update",
    "Weights",
    "normal",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing the package stays fast and loads no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'estune' has no attribute {name!r}")
    return getattr(import_module(f"estune.{_HOME[name]}"), name)

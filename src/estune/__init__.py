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
    from estune.journal.diff import diff
    from estune.journal.log import log
    from estune.journal.merge import merge
    from estune.journal.replay import replay
    from estune.journal.share import pack
    from estune.journal.signature import sign
    from estune.journal.verify import verify
    from estune.noise import normal
    from estune.run.branch import branch
    from estune.run.ensemble import Ensemble, ensemble
    from estune.run.evaluate import evaluate_model
    from estune.run.hub import pull, push
    from estune.run.load import load
    from estune.run.parameter_search import Engines, ParameterSearch
    from estune.run.swap import swap
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
    "Ensemble": "run.ensemble",
    "EstuneError": "errors",
    "EvolutionStrategy": "es.evolution",
    "Member": "es.strategy",
    "ParameterSearch": "run.parameter_search",
    "Strategy": "es.strategy",
    "Task": "tasks.base",
    "Trainer": "run.trainer",
    "Update": "es.strategy",
    "Weights": "weights.weights",
    "branch": "run.branch",
    "diff": "journal.diff",
    "ensemble": "run.ensemble",
    "evaluate_model": "run.evaluate",
    "load": "run.load",
    "log": "journal.log",
    "merge": "journal.merge",
    "normal": "noise",
    "pack": "journal.share",
    "pull": "run.hub",
    "push": "run.hub",
    "replay": "journal.replay",
    "sign": "journal.signature",
    "swap": "run.swap",
    "verify": "journal.verify",
}

__all__ = [
    "Config",
    "ESConfig",
    "ESTrainer",
    "Engines",
    "Ensemble",
    "EstuneError",
    "EvolutionStrategy",
    "Member",
    "ParameterSearch",
    "Strategy",
    "Task",
    "Trainer",
    "Update",
    "Weights",
    "branch",
    "diff",
    "ensemble",
    "evaluate_model",
    "load",
    "log",
    "merge",
    "normal",
    "pack",
    "pull",
    "push",
    "replay",
    "sign",
    "swap",
    "verify",
]
__version__ = "0.1.0"

former.install()


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: importing the package stays fast and loads no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'estune' has no attribute {name!r}")
    return getattr(import_module(f"estune.{_HOME[name]}"), name)

"""From settings to a pool of engines ready to train."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from estune.checkpoint import Checkpoint, locate
from estune.config import Config
from estune.engines.base import Engine, Sampling
from estune.engines.transformers import TransformersEngine
from estune.pool import LocalPool
from estune.strategy import EvolutionStrategy
from estune.weights import Weights, trained_parameters

log = logging.getLogger(__name__)

# Models above this size share their matrices' rows over all cores; smaller ones do better with one member per core.
LARGEST_REPLICATED = 256 << 20


@dataclass(frozen=True)
class Loaded:
    """A loaded model with its engines."""

    checkpoint: Checkpoint
    engine: TransformersEngine
    pool: LocalPool

    @property
    def weights(self) -> Weights:
        """Weights of the first engine, which hold everyone's base."""
        return self.pool.weights


def load_model(config: Config, model: str | Path | None = None) -> Loaded:
    """Load the model (by default the settings' one) and set up engines and weights.

    Raises:
        EstuneError: for a model that cannot be had or trained.
    """
    disable_progress_bar()  # transformers' own, which would stand in the middle of ours
    checkpoint = Checkpoint(locate(model or config.model))
    names = checkpoint.tensors
    device = "cpu" if config.device == "auto" else config.device  # weights are perturbed there only, so far
    engine = TransformersEngine(checkpoint.path, dtype=config.dtype, device=device, batch_size=config.batch_size)
    size = sum(p.nbytes for p in engine.model.parameters())
    cores = available_cores()
    replicas = config.replicas or (1 if config.weights == "inplace" or size > LARGEST_REPLICATED else cores)
    torch.set_num_threads(max(1, cores // replicas))

    def weigh(engine: TransformersEngine, sharing: Weights | None) -> tuple[Engine, Weights]:
        parameters = trained_parameters(engine.model, names, config.train_parameters)
        threads = cores if sharing is None and replicas == 1 else 1
        weights = Weights(
            parameters,
            policy=config.weights,
            rounding=config.rounding,
            noise=config.noise,
            threads=threads,
            sharing=sharing,
        )
        return engine, weights

    first = weigh(engine, None)
    if config.weights == "master":
        first[1].load(checkpoint)  # the engine may hold it rounded
    others = [weigh(engine.replica(), first[1]) for _ in range(replicas - 1)]
    return Loaded(checkpoint, engine, LocalPool([first, *others]))


def available_cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where it is set, else all it is given."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_strategy(config: Config) -> EvolutionStrategy:
    """The settings' strategy."""
    return EvolutionStrategy(
        seed=config.seed,
        population=config.population,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        steps=config.steps,
        schedule=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        mirrored=config.mirrored,
    )


def make_sampling(config: Config, seed: int = 0) -> Sampling:
    """The settings' way of drawing completions."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)

"""An engine with its weights: what evaluates a member, in this process or another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from estune.checkpoint import Checkpoint, locate
from estune.config import Config
from estune.engines.base import Completion, Sampling
from estune.engines.transformers import TransformersEngine
from estune.strategy import Member, Update
from estune.weights import Weights, trained_parameters


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A member's completions, one per prompt, and the seconds they took."""

    completions: list[Completion]
    perturb_time: float
    generate_time: float


class Replica:
    """A model of its own, perturbed around a base of its own.

    Two replicas that applied the same updates hold the same bits and give the same completions.

    Args:
        config: the settings; `config.threads` is the number of CPU threads to compute with.

    Raises:
        EstuneError: for a model that cannot be had or trained.
    """

    def __init__(self, config: Config) -> None:
        disable_progress_bar()  # transformers' own, which would stand in the middle of ours
        torch.set_num_threads(config.threads or 1)
        self.checkpoint = Checkpoint(locate(config.model))
        names = self.checkpoint.tensors
        device = "cpu" if config.device == "auto" else config.device  # weights are perturbed there only, so far
        self.engine = TransformersEngine(
            self.checkpoint.path, dtype=config.dtype, device=device, batch_size=config.batch_size
        )
        self.weights = Weights(
            trained_parameters(self.engine.model, names, config.train_parameters),
            policy=config.weights,
            rounding=config.rounding,
            noise=config.noise,
            threads=config.threads or 1,
        )
        if config.weights == "master":
            self.weights.load(self.checkpoint)  # the engine may hold it rounded

    def evaluate(
        self, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """Generate with a member's weights."""
        start = time.perf_counter()
        self.weights.perturb(member, sigma)
        perturbed = time.perf_counter()
        completions = self.engine.generate(prompt_ids, sampling)
        return Evaluated(completions, perturbed - start, time.perf_counter() - perturbed)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        self.weights.restore()
        return self.engine.generate(prompt_ids, sampling)

    def apply(self, update: Update) -> str:
        """Add an update to the base; return the fingerprint after it."""
        self.weights.apply(update)
        return self.weights.fingerprint()

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base."""
        self.weights.load(Checkpoint(checkpoint))

    def close(self) -> None:
        """Nothing to release: the model goes with the last reference."""

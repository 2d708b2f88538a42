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
from estune.engines.memory import memory_for, total_memory
from estune.engines.transformers import TransformersEngine
from estune.place import chosen_device, training_device
from estune.shared import Share
from estune.storage import keeps_base_on_host
from estune.strategy import Member, Update
from estune.weights import Parameter, Weights, trained_parameters


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A member's completions, one per prompt, and the seconds they took."""

    completions: list[Completion]
    perturb_time: float
    generate_time: float


class Replica:
    """A model of its own, perturbed around a base of its own or one that it shares.

    Around the same base two replicas give the same completions.

    Args:
        config: the settings; `config.threads` is the number of CPU threads to compute with.
        share: of a base that it shares with other processes. One of them fills it, and must have before any perturbs.
        perturbs: False for a replica that only generates. It has no `weights`, and any device and types will do.

    Raises:
        EstuneError: for a model that cannot be had or, if it `perturbs`, trained.
    """

    def __init__(self, config: Config, share: Share | None = None, *, perturbs: bool = True) -> None:
        disable_progress_bar()  # transformers' own, which would stand in the middle of ours
        torch.set_num_threads(config.threads or 1)
        self.checkpoint = Checkpoint(locate(config.model))
        self._device = (training_device if perturbs else chosen_device)(config.device)
        self.engine = TransformersEngine(
            self.checkpoint.path,
            dtype=config.dtype,
            device=str(self._device),
            batch_size=config.batch_size,
            cuda_graphs=config.cuda_graphs,
        )
        self._perturbs = perturbs
        if perturbs:
            self.weights = self._open_weights(config, share)

    def _open_weights(self, config: Config, share: Share | None) -> Weights:
        parameters = trained_parameters(self.engine.model, self.checkpoint.tensors, config.train_parameters)
        on_host = self._keeps_base_on_host(config, parameters)
        remedy = _less_base(self._device, on_host=on_host)
        with memory_for("the base that is kept beside the live weights", remedy):
            weights = Weights(
                parameters,
                policy=config.weights,
                rounding=config.rounding,
                noise=config.noise,
                threads=config.threads or 1,
                base_on_host=on_host,
                share=share,
            )
        if config.weights == "master":
            weights.load(self.checkpoint)  # the engine may hold it rounded
        return weights

    def evaluate(
        self, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """Generate with a member's weights."""
        start = time.perf_counter()
        self.weights.perturb(member, sigma)
        torch.get_device_module(self._device).synchronize(self._device)  # for the clock: a device is still at work
        perturbed = time.perf_counter()
        completions = self.engine.generate(prompt_ids, sampling)
        return Evaluated(completions, perturbed - start, time.perf_counter() - perturbed)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        if self._perturbs:
            self.weights.restore()
        return self.engine.generate(prompt_ids, sampling)

    def apply(self, update: Update) -> int:
        """Add an update to the base, or to its share of it; return the sum of the hashes of that after it."""
        self.weights.apply(update)
        return self.weights.share_sum()

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base, if this replica is the one that fills it."""
        self.weights.load(Checkpoint(checkpoint))

    def close(self) -> None:
        """Nothing to release: the model goes with the last reference."""

    def _keeps_base_on_host(self, config: Config, parameters: Sequence[Parameter]) -> bool:
        if self._device.type == "cpu" or config.weights == "inplace":
            return False
        memory = total_memory(self._device) // (config.replicas or 1)
        live = sum(p.nbytes for p in self.engine.model.parameters())
        base = sum(p.tensor.numel() * (4 if config.weights == "master" else p.tensor.itemsize) for p in parameters)
        return keeps_base_on_host(config.base_device, base=base, live=live, memory=memory)


def _less_base(device: torch.device, *, on_host: bool) -> str:
    """What to do where a base does not fit: another place for it, if there is one, or a smaller one."""
    another = "" if on_host or device.type == "cpu" else "base_device=host, "
    return f"set {another}weights=copy or weights=inplace, or fewer replicas"

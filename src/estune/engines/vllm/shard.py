"""What one of vLLM's workers trains: what is common to a model's own weights and to those of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.noise.reference import tensor_id
from estune.noise.rows import Run
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import device_kind, synchronize
from estune.weights.parameters import Parameter
from estune.weights.policies import Rule
from estune.weights.storage import flat, open_storage
from estune.weights.weights import Weights

SHAKEN = 0x5AFE  # seed of the noise that weights are overwritten with before a check


@dataclass(frozen=True, slots=True)
class Opening:
    """Which weights a worker trains, and how it keeps them."""

    checkpoint: Path
    rule: Rule
    threads: int
    base_on_host: bool
    chosen: Mapping[str, tuple[str, ...]]  # the tensors to train, each with its aliases
    counted: Mapping[int, list[bool]]  # by rank, for each parameter


class Shard(ABC):
    """The live weights of one worker, and the base beside them.

    Args:
        worker: vLLM's.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._rank = int(worker.rank)
        self._tensors: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}
        self.weights: Weights | None = None

    @abstractmethod
    def held(self) -> dict[str, Tensor]:
        """What of vLLM's is written to, by name, as it is now."""

    @abstractmethod
    def parameters(self, opening: Opening) -> list[Parameter]:
        """What is trained, in the order of `opening.counted`."""

    def call(self, method: str, *args: Any) -> Any:
        """Call one of the methods below, or of the weights.

        An `EstuneError` comes back as the answer: vLLM would wrap one that is raised in errors of its own.
        """
        try:
            with torch.no_grad():
                if method != "draw":
                    self._check_addresses()
                return getattr(self if hasattr(self, method) else self.weights, method)(*args)
        except EstuneError as error:
            return error

    def open(self, opening: Opening) -> None:
        """Keep a base beside the live weights, and check that restoring from it gives exactly what they were.

        Raises:
            EstuneError: it does not.
        """
        before = self.digests()
        self.weights = Weights(
            self.parameters(opening),
            policy=opening.rule.policy,
            rounding=opening.rule.rounding,
            noise=opening.rule.noise,
            scales=opening.rule.scales,
            threads=opening.threads,
            base_on_host=opening.base_on_host,
        )
        self.weights.subset(lambda parameter: True).perturb(SHAKEN, 1.0)
        self.load(opening.checkpoint)
        self.restore()
        self._compare(before, "loading it by the map of the parameters")

    def kind(self) -> str:
        """The kind of the device that the weights are on."""
        return device_kind(next(iter(self._tensors.values())).device)

    def perturb(self, member: Member, sigma: float) -> None:
        """As `Weights.perturb`, but wait until it is done, so that it is timed: only this process can wait."""
        assert self.weights is not None
        self.weights.perturb(member, sigma)
        self._wait()

    def restore(self) -> None:
        """As `Weights.restore`."""
        assert self.weights is not None
        self.weights.restore()

    def load(self, path: Path) -> None:
        """As `Weights.load`."""
        assert self.weights is not None
        self.weights.load(Checkpoint(path))

    def show(self, path: Path) -> None:
        """As `Weights.show`."""
        assert self.weights is not None
        self.weights.show(Checkpoint(path))

    def change_sums(self, path: Path) -> tuple[float, float]:
        """As `Weights.change_sums`."""
        assert self.weights is not None
        return self.weights.change_sums(Checkpoint(path))

    def anchor(self, path: Path, update: Update) -> None:
        """As `Weights.anchor`."""
        assert self.weights is not None
        self.weights.anchor(Checkpoint(path), update)

    def digests(self) -> dict[str, int]:
        """A hash of the bits of each live tensor, padding included, by vLLM's name."""
        return digests(self._tensors)

    def _hold(self) -> None:
        """Remember where what is written to lies."""
        self._tensors = self.held()
        self._addresses = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}

    def _wait(self) -> None:
        synchronize(next(iter(self._tensors.values())).device)

    def _compare(self, before: Mapping[str, int], what: str) -> None:
        now = self.digests()
        changed = next((name for name, digest in before.items() if now[name] != digest), None)
        if changed is not None:
            raise EstuneError(
                f"engine=vllm cannot train this model: {what} does not give back {changed}, which vLLM must keep in a "
                "layout of its own; use engine=transformers"
            )

    def _check_addresses(self) -> None:
        now = self.held()
        moved = next((name for name, address in self._addresses.items() if now[name].data_ptr() != address), None)
        if moved is not None or len(now) != len(self._addresses):
            raise EstuneError(
                f"vLLM has moved its weights ({moved or 'new ones'}) since the start: start the run again"
            )


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A hash of the bits of each tensor."""
    runs = {name: flat(tensor) for name, tensor in tensors.items()}
    return {name: open_storage([Run(t, t, tensor_id(name), 0)], 1).fingerprint() for name, t in runs.items()}

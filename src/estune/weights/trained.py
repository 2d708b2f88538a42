"""What a replica needs of the weights it trains, be they `Weights` or those of vLLM's processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from estune.es.strategy import Member, Update
from estune.weights.checkpoint import Checkpoint
from estune.weights.policies import Rule

Array = npt.NDArray[Any]
Runs = dict[str, Callable[[], Iterator[Array]]]
"""Whole tensors by checkpoint name, each in flat runs, as `Checkpoint.write` takes them."""


@dataclass(frozen=True, slots=True)
class Drift:
    """What in-place restoring left behind since the last update, over a sample of the weights."""

    changed: float  # fraction of weights that are not what they were
    rms: float  # root mean square of the difference


class TrainedWeights(Protocol):
    """The live weights of one engine and the base that they are perturbed around."""

    @property
    def rule(self) -> Rule:
        """How the base is kept and changed."""
        ...

    @property
    def tensors(self) -> Mapping[str, Sequence[str]]:
        """The trained tensors by checkpoint name, each with the names tied to it."""
        ...

    @property
    def elements(self) -> int:
        """Elements of all trained tensors."""
        ...

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        ...

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy drifts."""
        ...

    def apply(self, update: Update) -> None:
        """Add an update to the base, or to its share. The live weights follow at the next `perturb` or `restore`."""
        ...

    def anchor(self, checkpoint: Checkpoint, update: Update) -> None:
        """Bring the base, or its share of it, as far toward a checkpoint's tensors as an update says."""
        ...

    def fingerprint(self) -> str:
        """Hash of the base, 16 hexadecimal digits: equal bits, equal fingerprint, however they are split."""
        ...

    def share_sum(self) -> int:
        """Sum of the hashes of what `apply` updates: over all shares they add up to the fingerprint."""
        ...

    def drift(self) -> Drift | None:
        """How far the weights have drifted since the last update; None where the policy does not drift."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved."""
        ...

    def keep(self, name: str, most: int) -> None:
        """Keep a copy of the base in host memory under a name that no other base has; so many at most, the latest."""
        ...

    def bring(self, name: str) -> bool:
        """Make the copy of this name the base; return whether there is one."""
        ...

    def show(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the live weights, rounded to their type, until the next `perturb` or `restore`.

        Only where a base is kept: otherwise there is nothing to restore from.
        """
        ...

    def change(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """Norm of the base's difference from a checkpoint in the base's type, and of the checkpoint's tensors."""
        ...

    def runs(self) -> Runs:
        """The base of whole tensors by checkpoint name, tied names included."""
        ...


def as_norms(sums: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The norms that several `Weights.change_sums` add up to."""
    difference, norm = (sum(column) for column in zip(*sums, strict=True))
    return math.sqrt(difference), math.sqrt(norm)


def as_drift(sums: Sequence[tuple[int, int, float]]) -> Drift:
    """The drift that several `Weights.drift_sums` add up to."""
    watched, changed, squares = (sum(column) for column in zip(*sums, strict=True))
    return Drift(changed / max(watched, 1), math.sqrt(squares / max(watched, 1)))

"""What a strategy is: seeds out, rewards in, coefficients out. No tensors at all."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Pair = tuple[int, float]
"""A seed and the coefficient of its noise, a float32 value."""

_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Member:
    """One direction in parameter space: the noise of `seed`, added (+1) or subtracted (-1).

    The base itself takes part as a member of sign 0. A guided member's direction is `own` times the noise of `seed`,
    and the noise of earlier seeds, times float32 coefficients, which `along` holds.
    """

    seed: int
    sign: int = 1
    own: float = 1.0
    along: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Moments:
    """How an update is scaled for each weight, by moments of what updates add there: `weights/moments.py`, `Adam`.

    All are float32 values: the decay of the first and of the second moment, what the second is corrected by, and what
    is added to its root; `rate` has the correction of the first in it.
    """

    rate: float
    beta1: float
    beta2: float
    correction: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class Update:
    """A step as every worker applies it and the journal keeps it.

    First, where there is an anchor, base += anchor * (origin - base), then by at most `anchor_l1` toward the origin,
    which is the base model. Then base += decay * base + sum_n coefficients[n] * noise(members[n].seed), in this order,
    and what earlier steps add behind it. With `moments` these take in the sum, and what they make of it is added in its
    place.

    `earlier` is what steps before it add, the latest first, and `factors` are what those steps' own terms were
    multiplied by. `coefficients` are float32 values, signs included; one per member, 0.0 for a member that was left
    out. `rounding_seed` keys stochastic rounding, and `sigma` is what members were perturbed by, where the weights'
    policy asks for them.
    """

    step: int
    members: tuple[Member, ...]
    coefficients: tuple[float, ...]
    decay: float = 0.0
    rounding_seed: int = 0
    earlier: tuple[Pair, ...] = ()
    factors: tuple[float, ...] = ()
    anchor: float = 0.0
    anchor_l1: float = 0.0
    moments: Moments | None = None
    sigma: float = 0.0

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """What its own members add."""
        return tuple((m.seed, c) for m, c in zip(self.members, self.coefficients, strict=True) if c != 0.0)

    def undone(self) -> Update:
        """The step once it is taken back: one that changes nothing."""
        nothing = (0.0,) * len(self.members)
        return Update(self.step, self.members, nothing, rounding_seed=self.rounding_seed, sigma=self.sigma)


class Strategy(Protocol):
    """What a trainer needs of a search method."""

    seed: int
    step: int

    @property
    def sigma(self) -> float:
        """Standard deviation of the current step's perturbations."""
        ...

    @property
    def learning_rate(self) -> float:
        """Step size of the current step."""
        ...

    def ask(self, step: int | None = None) -> list[Member]:
        """The members to evaluate in a step, the current one if None."""
        ...

    def tell(self, rewards: Sequence[float | None]) -> Update:
        """The update that the members' rewards give, in their order; advances the step. We maximise."""
        ...

    def state(self) -> dict[str, Any]:
        """What `recall` takes beside the updates so far, as JSON holds it; empty where these say all."""
        ...

    def recall(self, updates: Sequence[Update], state: dict[str, Any]) -> None:
        """Go on after these updates, the last of which left this state."""
        ...


def plain(members: Sequence[Member]) -> tuple[Member, ...]:
    """Members as updates and journals name them, by seed and sign."""
    return tuple(Member(member.seed, member.sign) for member in members)


def alike(rewards: Sequence[float]) -> bool:
    """Whether there is nothing to learn from rewards: fewer than two, or equal but for what sums are rounded by."""
    return len(rewards) < 2 or max(rewards) - min(rewards) <= 1e-12 * abs(math.fsum(rewards) / len(rewards))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation; exactly rounded sums, so that every machine agrees."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def member_seed(run_seed: int, step: int, index: int) -> int:
    """64-bit seed of a member. Distinct for all steps below 2^40 and indices below 2^24 of a run.

    (step, index) is one counter, sent through a keyed bijection of 64-bit integers (SplitMix64).
    """
    counter = (step << 24) | index
    return _mix(_mix(run_seed & _MASK64) + (counter + 1) * 0x9E3779B97F4A7C15)


def _mix(z: int) -> int:
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def float32(x: float) -> float:
    """The nearest float32 value."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])

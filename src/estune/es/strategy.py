"""Evolution Strategies as ask / tell: seeds out, rewards in, coefficients out. No tensors at all.

The method is "Evolution Strategies at Scale" (arXiv 2509.24372): N members theta + sigma * eps_n, one reward each, and
the update theta <- theta + alpha / N * sum_n z_n * eps_n with z-scored rewards z_n, 1/sigma absorbed in alpha.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

log = logging.getLogger(__name__)

Schedule = Literal["constant", "linear", "cosine"]
Z_EPSILON = 1e-8  # the paper's guard in (R - mean) / (std + 1e-8)
_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Member:
    """One direction in parameter space: the noise of `seed`, added (+1) or subtracted (-1)."""

    seed: int
    sign: int = 1


@dataclass(frozen=True, slots=True)
class Update:
    """A step as every worker applies it and the journal keeps it.

    base += decay * base + sum_n coefficients[n] * noise(members[n].seed), in this order.

    `coefficients` are float32 values, signs included; one per member, 0.0 for a member that was left out.
    `rounding_seed` keys stochastic rounding, where the weights' policy asks for it.
    """

    step: int
    members: tuple[Member, ...]
    coefficients: tuple[float, ...]
    decay: float = 0.0
    rounding_seed: int = 0


class Strategy(Protocol):
    """What a trainer needs of a search method."""

    sigma: float
    step: int

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


class EvolutionStrategy:
    """The paper's strategy.

    Args:
        seed: the run's seed; member seeds are a function of (seed, step, index).
        population: members a step (N), 2 or more; even if `mirrored`.
        sigma: standard deviation of the perturbation, above 0.
        learning_rate: alpha; sigma / 2 if None.
        steps: length of the run, which the schedule refers to.
        schedule: learning rate over the run: constant, or falling to zero after `steps` linearly or as a cosine.
        weight_decay: share of the weights taken off per step, times the learning rate; none where rewards are equal.
        mirrored: evaluate each direction with both signs (antithetic sampling).
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        population: int = 30,
        sigma: float = 0.001,
        learning_rate: float | None = None,
        steps: int = 1,
        schedule: Schedule = "constant",
        weight_decay: float = 0.0,
        mirrored: bool = False,
    ) -> None:
        if not sigma > 0 or not math.isfinite(sigma):
            raise ValueError(f"sigma is {sigma}: it must be above 0")
        if population < 2 or (mirrored and population % 2):
            raise ValueError(f"population is {population}: it must be 2 or more, and even when mirrored")
        self.seed = seed
        self.population = population
        self.sigma = sigma
        self.peak_learning_rate = sigma / 2 if learning_rate is None else learning_rate
        self.steps = steps
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.mirrored = mirrored
        self.step = 0

    @property
    def learning_rate(self) -> float:
        """Alpha of the current step."""
        progress = min(self.step / self.steps, 1.0)
        match self.schedule:
            case "linear":
                return self.peak_learning_rate * (1 - progress)
            case "cosine":
                return self.peak_learning_rate * (1 + math.cos(math.pi * progress)) / 2
            case _:
                return self.peak_learning_rate

    def ask(self, step: int | None = None) -> list[Member]:
        """The members of a step, the current one if None: `population` of them, in a fixed order."""
        step = self.step if step is None else step
        if self.mirrored:
            seeds = [member_seed(self.seed, step, i) for i in range(self.population // 2)]
            return [Member(s, sign) for s in seeds for sign in (1, -1)]
        return [Member(member_seed(self.seed, step, i)) for i in range(self.population)]

    def tell(self, rewards: Sequence[float | None]) -> Update:
        """z-score the rewards (population standard deviation) and turn them into coefficients.

        Members whose reward is None or not finite get no weight, and N counts the rest. Where all rewards are equal
        there is nothing to learn: coefficients and decay are zero.
        """
        members = self.ask()
        if len(rewards) != len(members):
            raise ValueError(f"{len(rewards)} rewards for {len(members)} members")
        valid = [r for r in rewards if r is not None and math.isfinite(r)]
        if len(valid) < len(rewards):
            log.warning("step %d: %d of %d members failed", self.step + 1, len(rewards) - len(valid), len(rewards))
        mean, std = mean_and_std(valid)
        flat = alike(valid)
        if len(valid) < 2:
            log.warning("step %d: fewer than two members have a reward, so the weights stay as they are", self.step + 1)

        alpha = self.learning_rate
        coefficients = []
        for member, reward in zip(members, rewards, strict=True):
            if flat or reward is None or not math.isfinite(reward):
                coefficients.append(0.0)
            else:
                z = (reward - mean) / (std + Z_EPSILON)
                coefficients.append(_float32(alpha / len(valid) * z * member.sign))
        decay = 0.0 if flat else _float32(-alpha * self.weight_decay)
        rounding_seed = member_seed(self.seed, self.step, self.population)
        update = Update(self.step, tuple(members), tuple(coefficients), decay, rounding_seed)
        self.step += 1
        return update


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


def _float32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])

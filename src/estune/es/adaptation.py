"""Sigma that adapts itself, and a penalty that does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from estune.es.strategy import alike

GOAL = 1 / 5


@dataclass(slots=True)
class OneFifth:
    """The one-fifth success rule: sigma grows where more than a fifth of the members are better than the base.

    sigma <- sigma * exp(rate * (p - 1/5)), where p is the share of members that score above the base on the same
    prompts, with half of those that score as much (Rechenberg 1973; in this form Kern et al. 2004). Beyond `LARGEST`
    times its first value, or below that part of it, sigma does not go.
    """

    rate: float = 0.5
    factor: float = 1.0  # of the first sigma

    LARGEST = 16.0

    def tell(self, margins: Sequence[float]) -> None:
        """Take in a step: by how much each member scores above the base; none where nothing is known."""
        if not margins:
            return
        better = sum(m > 0 for m in margins) + sum(m == 0 for m in margins) / 2
        changed = self.factor * math.exp(self.rate * (better / len(margins) - GOAL))
        self.factor = min(max(changed, 1 / self.LARGEST), self.LARGEST)


@dataclass(slots=True)
class Constraint:
    """A second objective as a bound, with a multiplier that is learned: dual ascent on the Lagrangian.

    Both count in units of what members differ by, so that neither's scale matters: the fitness is reward - multiplier *
    violation * std(rewards) / std(values), where violation is how far a value is beyond the bound, negative where there
    is room left. After each step multiplier <- max(0, multiplier + rate * mean violation / std(values)) (Tessler et al.
    2019, arXiv 1805.11074); that quotient counts as 1 at most, and -1 at least, so that a leap is no larger than the
    way back.
    """

    bound: float
    at_most: bool = True  # otherwise the value is to be at least the bound
    rate: float = 0.5
    multiplier: float = 0.0

    def fitness(
        self, rewards: Sequence[float | None], values: Sequence[float | None], groups: int = 1
    ) -> list[float | None]:
        """Rewards less the penalty; None where one of both is missing or not finite. Learns the next step's multiplier.

        Groups with prompts of their own are all taken to be as far from the bound on average, as it is their prompts
        that make the difference; members of a group without any value are taken to be there too. Without any value at
        all rewards are as they were.

        Args:
            rewards, values: of each member; the base, which takes part as the last one of its group, among them.
            groups: of members, of equal size, one after another.
        """
        finite = [None if v is None or not math.isfinite(v) else v for v in values]
        known = _known(finite)
        if not known:
            return list(rewards)
        sign = 1.0 if self.at_most else -1.0
        beyond = sign * (math.fsum(known) / len(known) - self.bound)
        own = _deviations(finite, groups)
        spread, scale = _size(own), _size(_deviations(rewards, groups)) or 1.0
        price = self.multiplier * scale / spread if spread else 0.0  # where all values are alike, none is dearer
        self.multiplier = max(0.0, self.multiplier + self.rate * _within_one(beyond, spread))
        size = len(finite) // groups
        without = [not _known(finite[first : first + size]) for first in range(0, size * groups, size)]
        found: list[float | None] = []
        for i, (reward, deviation) in enumerate(zip(rewards, own, strict=True)):
            away = 0.0 if without[i // size] else deviation
            found.append(None if reward is None or away is None else reward - price * (beyond + sign * away))
        return found


def _deviations(values: Sequence[float | None], groups: int) -> list[float | None]:
    """From the mean of each value's group; exactly 0 in a group of values that differ by what sums are rounded by."""
    size = len(values) // groups
    found: list[float | None] = []
    for first in range(0, size * groups, size):
        group = values[first : first + size]
        known = _known(group)
        level = math.fsum(known) / len(known) if known else 0.0
        same = alike(known)
        found += [None if value is None else 0.0 if same else value - level for value in group]
    return found


def _size(deviations: Sequence[float | None]) -> float:
    """Their root mean square."""
    known = _known(deviations)
    return math.sqrt(math.fsum(d * d for d in known) / len(known)) if known else 0.0


def _within_one(value: float, unit: float) -> float:
    """A value in units, from -1 to 1; of no unit its sign."""
    return math.copysign(1.0, value) if abs(value) > unit else value / unit if unit else 0.0


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]

"""Sigma that adapts itself, and a penalty that does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    The fitness is reward - multiplier * violation with violation = (value - bound) / |bound|, negative where there is
    room left, and after each step multiplier <- max(0, multiplier + rate * mean violation) (arXiv 1910.01708).
    """

    bound: float
    at_most: bool = True  # otherwise the value is to be at least the bound
    rate: float = 0.5
    multiplier: float = 0.0

    def fitness(
        self, rewards: Sequence[float | None], values: Sequence[float | None], groups: int = 1
    ) -> list[float | None]:
        """Rewards less the penalty; None where one of both is missing. Learns the multiplier for the next step.

        Groups with prompts of their own are all taken to be as far from the bound on average, as it is their prompts
        that make the difference; members of a group without any value are taken to be there too.

        Args:
            rewards, values: of each member; the base, which takes part as the last one of its group, among them.
            groups: of members, of equal size, one after another.
        """
        scale = abs(self.bound) or 1.0
        sign = 1.0 if self.at_most else -1.0
        over = [None if v is None else sign * (v - self.bound) / scale for v in values]
        if (mean := _mean(over)) is None:
            return list(rewards)
        found: list[float | None] = []
        size = len(over) // groups
        for first in range(0, size * groups, size):
            level = _mean(over[first : first + size])
            for reward, own in zip(rewards[first : first + size], over[first : first + size], strict=True):
                violation = mean if level is None else None if own is None else own + (mean - level)
                found.append(None if reward is None or violation is None else reward - self.multiplier * violation)
        self.multiplier = max(0.0, self.multiplier + self.rate * mean)
        return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None

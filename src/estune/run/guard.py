"""Whether a run is to go back: what the base earns on a step's prompts before and after it, and in evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from estune.es.strategy import mean_and_std
from estune.grading.grading import Grading
from estune.journal.records import EvaluationRecord, rank
from estune.pool.base import Pool
from estune.run.asked import Answered


@dataclass(frozen=True, slots=True)
class Look:
    """What the base earned before a step and after it, on the same prompts and with the same draws.

    Attributes:
        before, after: its mean reward over all groups' prompts; None where there is none after it.
        spread: standard deviation of the members' rewards, within groups.
        tokens: generated for `after`.
    """

    before: float
    after: float | None
    spread: float
    tokens: int

    @classmethod
    def at(cls, answered: Answered, before: float, pool: Pool, grading: Grading) -> Self:
        """Have the base that is new complete what the old one did, as one more member of each group.

        Args:
            answered: what the step's members came to.
            before: what the base earned before the update.
            pool: evaluates; it has made the update.
            grading: grades.
        """
        asked = answered.asked
        bases = [member for member in asked.members if not member.sign]
        evaluations = [
            pool.evaluate([base], asked.sigma, prompt_ids, asked.sampling)
            for base, (_, prompt_ids) in zip(bases, asked.groups, strict=True)
        ]
        again = replace(asked, members=bases, evaluations=evaluations).graded(grading, lambda done: None)
        rewards = [graded.grades.mean for graded in answered.perturbed]
        size = len(rewards) // len(bases)
        groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
        spreads = [mean_and_std([reward for reward in group if reward is not None])[1] for group in groups]
        spread = math.hypot(*spreads) / math.sqrt(len(spreads))
        return cls(before, again.base_reward, spread, again.tokens)

    def harmed(self, guard: float) -> bool:
        """Whether the base earns less than before by more than `guard` times the spread, or nothing at all."""
        return self.after is None or self.after < self.before - guard * self.spread

    def metrics(self, *, taken_back: bool) -> dict[str, float]:
        """What the step's metrics say of it."""
        found = {"taken_back": float(taken_back)}
        return found if self.after is None else found | {"reward_after": self.after}

    def __str__(self) -> str:
        after = "nothing that can be told" if self.after is None else f"{self.after:.4g}"
        return f"the base earned {self.before:.4g} before it, {after} after"


def falls_short(now: EvaluationRecord, best: EvaluationRecord, best_by: Sequence[str], most: float) -> bool:
    """Whether an evaluation is worse than the best one so far by more than `most`, in the metric that tells first."""
    (of_now,), (of_best,) = (rank(each.metrics, best_by[:1]) for each in (now, best))
    return of_now < of_best - most

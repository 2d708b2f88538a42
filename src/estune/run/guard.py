"""Whether a step has harmed the base: what it earns on the step's prompts, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from estune.es.strategy import Update, mean_and_std
from estune.grading.grading import Grading
from estune.pool.base import Pool
from estune.run.asked import Asked
from estune.run.graded import Graded


@dataclass(frozen=True, slots=True)
class Look:
    """What the base earned before a step and after it, on the same prompts and with the same draws.

    Attributes:
        before, after: its mean reward; None where there is none after it.
        spread: standard deviation of the members' rewards.
        tokens: generated for `after`.
    """

    before: float
    after: float | None
    spread: float
    tokens: int

    @classmethod
    def at(
        cls, asked: Asked, members: Sequence[Graded], before: float, update: Update, pool: Pool, grading: Grading
    ) -> Self:
        """Have the base that is new complete what the old one did, as one more member.

        Args:
            asked: of the step.
            members: what they came to.
            before: what the base earned before the update.
            update: which the pool has made.
            pool: evaluates.
            grading: grades.
        """
        (rows, prompt_ids), *_ = asked.groups
        (_, done), *_ = pool.evaluate(update.members[-1:], asked.sigma, prompt_ids, asked.sampling)
        after = Graded(rows, done.completions, grading.grade(rows, done.completions))
        known = [reward for member in members if (reward := member.grades.mean) is not None]
        return cls(before, after.grades.mean, mean_and_std(known)[1], after.tokens)

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

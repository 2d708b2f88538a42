"""Objectives: from the scores of a member's completions to the one number that it is judged by, its fitness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from estune.es.shaping import quantile
from estune.es.strategy import alike, mean_and_std

Score = float | None  # None: it does not apply
PerPrompt = Literal["none", "center", "standardize"]


@dataclass(frozen=True, slots=True)
class Objective:
    """What of the scores is to be made large.

    Attributes:
        samples: completions of each prompt (n).
        best_of: k: a prompt's score is the expected best of k of its completions. 1 is their mean, n their maximum; of
            scores 0 and 1 it is pass@k (arXiv 2107.03374).
        quantile: of the prompts' scores, which is the fitness instead of their mean; a low one looks at the worst.
        per_prompt: what is done to a prompt's score first, over all members that have the prompt: nothing, their mean
            taken off (`center`), and divided by their standard deviation as well (`standardize`), as GRPO does over the
            completions of a prompt (arXiv 2402.03300).
    """

    samples: int = 1
    best_of: int = 1
    quantile: float | None = None
    per_prompt: PerPrompt = "none"

    def fitness(self, scores: Sequence[Sequence[Score]], groups: int = 1) -> list[float | None]:
        """One number a member, None for one without a score or with one that is not finite.

        Args:
            scores: of each member's completions, `[members][prompts * samples]`, those of a prompt one after another.
            groups: members in so many groups of equal size, one after another, each with prompts of its own.
        """
        by_prompt = [self._of_prompts([None] * len(each) if failed(each) else each) for each in scores]
        size = len(by_prompt) // groups
        found: list[float | None] = []
        for first in range(0, size * groups, size):
            found += map(self._of_member, self._relative(by_prompt[first : first + size]))
        return found

    def _of_prompts(self, scores: Sequence[Score]) -> list[Score]:
        of_each = [scores[i : i + self.samples] for i in range(0, len(scores), self.samples)]
        return [best_of(counted(each), self.best_of) for each in of_each]

    def _relative(self, by_prompt: Sequence[Sequence[Score]]) -> list[list[Score]]:
        """The scores, `[members][prompts]`, against what the other members' come to on each prompt."""
        if self.per_prompt == "none" or not by_prompt[0]:
            return [list(of_member) for of_member in by_prompt]
        columns = [self._against_others(column) for column in zip(*by_prompt, strict=True)]
        return [list(of_member) for of_member in zip(*columns, strict=True)]

    def _against_others(self, scores: Sequence[Score]) -> list[Score]:
        """Members' scores of one prompt; exactly 0 where these differ by what sums are rounded by."""
        known = counted(scores)
        same = alike(known)
        mean, std = mean_and_std(known)
        by = std if self.per_prompt == "standardize" and std > 0 else 1.0
        return [None if s is None else 0.0 if same else (s - mean) / by for s in scores]

    def _of_member(self, scores: Sequence[Score]) -> float | None:
        found = counted(scores)
        if not found:
            return None
        return mean_and_std(found)[0] if self.quantile is None else quantile(found, self.quantile)


def best_of(scores: Sequence[float], k: int) -> float | None:
    """The expected maximum of k of n scores, drawn without replacement; of fewer than k, their maximum; None of none.

    With the scores in ascending order s_1 ... s_n, it is sum_i C(i - 1, k - 1) / C(n, k) * s_i.
    """
    if not scores:
        return None
    k = min(k, len(scores))
    ways = math.comb(len(scores), k)
    return math.fsum(math.comb(i, k - 1) / ways * s for i, s in enumerate(sorted(scores)))


def counted(scores: Sequence[Score]) -> list[float]:
    """The scores that apply."""
    return [s for s in scores if s is not None]


def failed(scores: Sequence[Score]) -> bool:
    """Whether a score is not finite, so that nothing can be said of the member."""
    return not all(map(math.isfinite, counted(scores)))

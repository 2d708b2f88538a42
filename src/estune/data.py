"""Which training rows a step uses."""

from __future__ import annotations

import random


class RowOrder:
    """Rows drawn without replacement, epoch after epoch, as a pure function of (seed, step).

    Args:
        size: rows of the training set.
        per_step: rows a step. Where it is the whole set or more, every step uses the whole set, as in the paper.
        seed: the run's seed.
    """

    def __init__(self, size: int, per_step: int, seed: int) -> None:
        self.size, self.per_step, self.seed = size, min(per_step, size), seed
        self._epoch = -1
        self._rows: list[int] = []

    def rows(self, step: int) -> list[int]:
        """Indices of the step's rows, `per_step` of them; a step may straddle two epochs."""
        if self.per_step == self.size:
            return list(range(self.size))
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._shuffled(p // self.size)[p % self.size] for p in positions]

    def _shuffled(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, list(range(self.size))
            random.Random(f"rows {self.seed} {epoch}").shuffle(self._rows)
        return self._rows

"""Which training rows a step uses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from estune.tasks.base import Stage


class RowOrder:
    """Rows drawn without replacement, epoch after epoch, as a pure function of (seed, step).

    Args:
        size: rows of the training set.
        per_step: rows a step. Where it is the whole set or more, every step uses the whole set, as in the paper.
        seed: the run's seed.
    """

    def __init__(self, size: int, per_step: int, seed: int) -> None:
        self.size = size
        self.per_step = min(per_step, size)
        self.seed = seed
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
            self._epoch = epoch
            self._rows = list(range(self.size))
            random.Random(f"rows {self.seed} {epoch}").shuffle(self._rows)
        return self._rows


class StagedOrder:
    """Rows of a step where a task has stages: a pure function of (seed, step, evaluations up to that step).

    Args:
        size: rows of the training set.
        stages: the task's; none: one without end, of all rows.
        per_step: rows a step, or fewer where a stage has fewer.
        seed: the run's seed.
        in_one: steps one after another that have the same rows.
    """

    def __init__(self, size: int, stages: Sequence[Stage], per_step: int, seed: int, in_one: int = 1) -> None:
        self.stages = list(stages) or [Stage(range(size))]
        self.orders = [RowOrder(len(stage.rows), per_step, seed) for stage in self.stages]
        self.per_step = max(order.per_step for order in self.orders)
        self.in_one = in_one

    def rows(self, step: int, evaluations: Mapping[int, Mapping[str, float]] = MappingProxyType({})) -> list[int]:
        """Indices of the step's rows.

        Args:
            step: which step, 0 the first.
            evaluations: metrics by step, of which those up to `step` count.
        """
        first = step - step % self.in_one
        number, began = self.stage(first, evaluations)
        return [self.stages[number].rows[i] for i in self.orders[number].rows((first - began) // self.in_one)]

    def used(self, first_step: int, steps: int) -> list[int]:
        """All rows that the steps from `first_step` to `steps` can use; with stages, all rows of all stages."""
        if len(self.stages) == 1:
            return sorted({row for step in range(first_step, steps) for row in self.rows(step)})
        return sorted({row for stage in self.stages for row in stage.rows})

    def stage(self, step: int, evaluations: Mapping[int, Mapping[str, float]]) -> tuple[int, int]:
        """Number of the step's stage, and the step it began at."""
        began = 0
        for number, stage in enumerate(self.stages[:-1]):
            ends = [] if stage.until_step is None else [max(began, stage.until_step)]
            ends += [at for at, metrics in evaluations.items() if at >= began and stage.reached(metrics)]
            if min(ends, default=step + 1) > step:
                return number, began
            began = min(ends)
        return len(self.stages) - 1, began

"""Grades that are under way, and how they are put together from what each function gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from estune.grading.convention import Batch, Grades, reward_name, weighted, without_nan
from estune.grading.marks import Marks

if TYPE_CHECKING:
    from estune.grading.grading import Grading

log = logging.getLogger(__name__)


class Pending:
    """Grades of a batch that are under way."""

    def __init__(self, grading: Grading, batch: Batch, collect: Sequence[Callable[[], Marks]]) -> None:
        self._grading = grading
        self.batch = batch
        self._collect = collect

    def result(self) -> Grades:
        """Wait for the grades.

        Raises:
            EstuneError: a function failed, and that ends the run.
        """
        return self.grades(self.marks())

    def marks(self) -> list[Marks]:
        """Wait for what each function gives."""
        return [collect() for collect in self._collect]

    def grades(self, given: Sequence[Marks]) -> Grades:
        """Weight and add up what the functions gave.

        Args:
            given: the marks of each function.

        Raises:
            EstuneError: a function failed, and that ends the run.
        """
        functions = self._grading.functions
        weights = self._grading.weights
        size = len(self.batch)
        left_out: set[int] = set()
        marked: dict[str, Marks] = {}
        extras: dict[str, list[Any]] = {}
        logged: dict[str, list[float]] = {}
        for function, marks in zip(functions, given, strict=True):
            marked[reward_name(function)] = marks
            marks.values = without_nan(marks.values)
            for row, why in marks.errors.items():
                self._grading.exclude(function, self.batch, row, why)
                left_out.update(range(size) if row is None else (row,))
            bad = next((i for i, v in enumerate(marks.values) if v is not None and not math.isfinite(v)), None)
            if bad is not None:
                log.warning(
                    "reward %s gave %s for %s: the member is left out",
                    *(reward_name(function), marks.values[bad], self.batch.show(bad)),
                )
            extras |= marks.log.extras
            for name, values in marks.log.metrics.items():
                logged.setdefault(name, []).extend(values)
        columns = [marked[reward_name(function)].values for function in functions]
        total = [
            None if i in left_out else weighted(scores, weights) for i, scores in enumerate(zip(*columns, strict=True))
        ]
        self._grading.note_nothing(total, left_out, self.batch)
        return Grades(
            total,
            {name: marks.values for name, marks in marked.items()},
            {name: marks.failures for name, marks in marked.items() if marks.failures},
            extras,
            logged,
            {name: marks.log.counts for name, marks in marked.items() if marks.log.counts},
        )

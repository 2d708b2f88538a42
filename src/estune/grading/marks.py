"""Marks: what one reward function gave a batch of completions, and where it failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from estune.grading.convention import Log, describe
from estune.grading.isolation import Isolation
from estune.grading.level import Level
from estune.grading.verdict import Verdict


@dataclass
class Marks:
    """What one function gave a batch.

    Attributes:
        log: what it logged.
        failures: how many completions failed in which way.
        values: a score for each completion; None where it does not apply, or failed.
        errors: why it failed, by row; None stands for the whole batch.
    """

    log: Log
    failures: dict[str, int] = field(default_factory=dict)
    values: list[float | None] = field(default_factory=list)
    errors: dict[int | None, str] = field(default_factory=dict)

    def take(self, scores: Sequence[float | Exception | None], level: Level) -> None:
        """Take what the function returned for the whole batch."""
        if level == "corpus" and isinstance(scores[0], Exception):
            raise scores[0]
        self.values = [None if isinstance(score, Exception) else score for score in scores]
        self.errors = {row: describe(score) for row, score in enumerate(scores) if isinstance(score, Exception)}
        if self.errors:
            self.failures["errors"] = len(self.errors)

    def fail(self, row: int | None, why: str, size: int) -> None:
        """Note that the function failed on the whole batch, because of one row or of none in particular."""
        self.values = [None] * size
        self.errors = {row: why}
        self.failures["errors"] = size

    def of_member(self, member: int, size: int) -> Marks:
        """A member's part of what a population-level function gave, repeated for each of its completions."""
        found = Marks(Log(size), values=[self.values[member]] * size)
        if member in self.errors:
            found.fail(None, self.errors[member], size)
        found.log.extras = {column: [values[member]] * size for column, values in self.log.extras.items()}
        if member == 0:  # what was logged once is to count once
            found.log.metrics = self.log.metrics
            found.log.counts = self.log.counts
        return found

    def add(self, row: int, verdict: Verdict, isolation: Isolation, size: int) -> None:
        """Take the next row's verdict."""
        kind = verdict.kind
        if verdict.score is not None and not math.isfinite(verdict.score):
            kind = "crashes"  # one completion's doing: it must not cost its member the step
        if kind == "errors":
            self.errors[row] = verdict.text
        if kind != "score":
            self.failures[kind] = self.failures.get(kind, 0) + 1
        failed = kind in ("timeouts", "crashes", "too_long")
        self.values.append(isolation.failure_score if failed else verdict.score)
        for column, values in verdict.extras.items():
            self.log.extras.setdefault(column, [None] * size)[row] = values[0]
        for name, logged in verdict.metrics.items():
            self.log.metrics.setdefault(name, []).extend(logged)
        for name, number in verdict.counts.items():
            self.log.count(name, number)

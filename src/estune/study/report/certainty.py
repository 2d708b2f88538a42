"""How certain the figures of an evaluation are: 95% intervals over its held-out prompts.

Prompts are counted, since several completions of a prompt are not independent of one another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from estune.journal.records import EvaluationRecord
from estune.journal.shares import NORMAL_95, is_share, wilson
from estune.study.report.runs import Run, bounded
from estune.study.report.tables import Row

COLUMNS = {
    "eval_reward": "reward",
    "eval_completions/mean_length": "tokens",
    "eval_completions/clipped_ratio": "finished",
}
"""Metrics that are means over the rows of a column, or one minus such a mean; those of reward functions beside them."""

Interval = tuple[float, float]


def interval(run: Run, evaluation: EvaluationRecord, key: str) -> Interval | None:
    """The 95% interval of a metric of an evaluation, if its completions are known, else None.

    Wilson's for a share, else 1.96 standard errors (n - 1) of the prompts' means around what was recorded.
    """
    value = evaluation.metrics.get(key)
    rows = run.evaluated.get(evaluation.step)
    if value is None or rows is None:
        return None
    if key == "eval_accuracy" and is_share(run.journal, key):
        return _of_share(value, problems(run, evaluation))
    column = run.accuracy_column if key == "eval_accuracy" else COLUMNS.get(key, _function(key))
    means = _by_prompt(rows, column, _samples(run)) if column else []
    if column == "finished":
        return _of_share(value, len(means))
    if len(means) < 2:
        return None
    half = NORMAL_95 * statistics.stdev(means) / math.sqrt(len(means))
    return value - half, value + half


def problems(run: Run, evaluation: EvaluationRecord) -> int:
    """The number of held-out prompts of an evaluation's accuracy; 0 if its completions are not known."""
    rows = run.evaluated.get(evaluation.step, [])
    if run.accuracy_column:
        return len(_by_prompt(rows, run.accuracy_column, _samples(run)))
    return math.ceil(len(rows) / _samples(run))


def _of_share(value: float, count: int) -> Interval | None:
    return wilson(min(1.0, max(0.0, value)), count) if count else None


def _function(key: str) -> str | None:
    return key.removeprefix("eval_").removesuffix("/mean") if key.startswith("eval_rewards/") else None


def _samples(run: Run) -> int:
    """Completions of each prompt, which follow one another."""
    return int(run.settings.get("eval_samples") or 1)


def _by_prompt(rows: Sequence[Row], column: str, samples: int) -> list[float]:
    """The mean of a column for each prompt that has a value there."""
    found = []
    for i in range(0, len(rows), samples):
        values = [row.get(column) for row in rows[i : i + samples]]
        numbers = [bounded(float(v)) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
        if numbers:
            found.append(statistics.fmean(numbers))
    return found

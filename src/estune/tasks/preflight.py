"""Before training: gold answers must earn full marks, and worthless ones must not, or rewards cannot teach anything."""

from __future__ import annotations

import logging
from collections.abc import Callable

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.convention import Row, reward_name
from estune.grading.grading import Grading
from estune.grading.level import level_of
from estune.tasks.base import Task

log = logging.getLogger(__name__)

FULL_MARKS = 1.0
MOST_TRIED = 64
"""Rows of a set whose worthless completions are graded."""


def preflight(task: Task, grading: Grading, rows: int = 8) -> int:
    """Grade the gold completions of the first rows of both sets by the rewards that tell accuracy.

    Worthless completions are graded too, for rows for which a reward function's `worthless(row)` gives some.

    Args:
        task: what is to be trained; without `gold` or `accuracy` no gold completion is graded.
        grading: grades by the task's rewards.
        rows: how many rows of each set to grade; all of them where a corpus-level reward tells accuracy.

    Returns:
        The number of gold completions that were graded.

    Raises:
        EstuneError: a gold completion does not get 1.0, or a worthless one does; the message has row, score and
            completion.
    """
    _refuse_free_marks(task, grading)
    if task.gold is None or not task.accuracies:
        return 0
    telling = (function for function in task.reward_funcs if reward_name(function) in task.accuracies)
    if "corpus" in map(level_of, telling):
        rows = max(len(task.train), len(task.evaluation))  # it need not be 1 for a part
    checked = 0
    for side, data in (("training", task.train), ("evaluation", task.evaluation)):
        gold = {number: text for number in range(min(rows, len(data))) if (text := task.gold(data[number])) is not None}
        if not gold:
            continue
        completions = [Completion(text, [], True) for text in gold.values()]
        scores = grading.grade([data[number] for number in gold], completions).scores
        for i, (number, text) in enumerate(gold.items()):
            given = {name: score for name in task.accuracies if (score := scores[name][i]) is not None}
            if not given or min(given.values()) < FULL_MARKS:
                marks = ", ".join(f"{name} gives {score:g}" for name, score in given.items()) or "no reward applies"
                raise EstuneError(
                    f"task {task.name}: the gold answer of {side} row {number} should get {FULL_MARKS:g}, but {marks}: "
                    f"{text[:200]!r}; mend the reward or the answers before training"
                )
        checked += len(gold)
    return checked


def _refuse_free_marks(task: Task, grading: Grading) -> None:
    for function in task.reward_funcs:
        worthless: Callable[[Row], list[str]] | None = getattr(function, "worthless", None)
        if worthless is None:
            continue
        name = reward_name(function)
        for side, data in (("training", task.train), ("evaluation", task.evaluation)):
            found = {number: texts for number, row in enumerate(data) if (texts := worthless(row))}
            chosen = list(found)[:: -(-len(found) // MOST_TRIED) or 1]
            if len(chosen) < len(found):
                log.warning(
                    "task %s: of %d %s rows whose tests may check nothing, %d are tried",
                    *(task.name, len(found), side, len(chosen)),
                )
            tried = [(number, text) for number in chosen for text in found[number]]
            if not tried:
                continue
            completions = [Completion(text, [], True) for _, text in tried]
            scores = grading.grade([data[number] for number, _ in tried], completions).scores[name]
            for (number, text), score in zip(tried, scores, strict=True):
                if score is not None and score >= FULL_MARKS:
                    raise EstuneError(
                        f"task {task.name}: {name} gives {score:g} to a completion of {side} row {number} that does "
                        f"nothing, {text[:200]!r}: its tests check nothing; mend them, or take the row out"
                    )

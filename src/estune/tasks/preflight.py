"""Before training: gold answers must earn full marks, or the reward cannot teach anything."""

from __future__ import annotations

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.tasks.base import Task

FULL_MARKS = 1.0


def preflight(task: Task, grading: Grading, rows: int = 8) -> int:
    """Grade the gold completions of the first rows of both sets by the rewards that tell accuracy.

    Args:
        task: what is to be trained; without `gold` or `accuracy` nothing is checked.
        grading: grades by the task's rewards.
        rows: how many rows of each set to grade.

    Returns:
        The number of gold completions that were graded.

    Raises:
        EstuneError: one of them does not get 1.0; with the row, the score and the completion.
    """
    if task.gold is None or not task.accuracies:
        return 0
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

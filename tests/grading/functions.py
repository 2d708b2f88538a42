"""Rows, completions of them, and reward functions that tests of grading share."""

from __future__ import annotations

from typing import Any

from estune.completion import Completion
from estune.tasks.base import Task

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}, {"prompt": "three", "answer": 3}]
COMPLETIONS = [Completion(text, [7, 8, i], True) for i, text in enumerate(["1", "x", "3"])]


def right(prompts: Any, completions: list[str], answer: list[int], **_: Any) -> list[float]:
    return [float(text == str(a)) for text, a in zip(completions, answer, strict=True)]


def half_of_even(answer: list[int], **_: Any) -> list[float | None]:
    return [0.5 if a % 2 == 0 else None for a in answer]


def task_of(functions: list[Any], **more: Any) -> Task:
    rows = [{**row, "kind": "odd" if row["answer"] % 2 else "even"} for row in ROWS]
    evaluation = [{**row, "prompt": row["prompt"] + "?"} for row in rows]
    weights = [1.0] * len(functions)
    return Task("sum", rows, evaluation, functions, weights, functions[0].__name__, **more)


def fails_on_two(answer: list[int], **_: Any) -> list[float]:
    return [1 / (a - 2) for a in answer]

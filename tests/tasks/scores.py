"""What rewards give to rows of tasks."""

from __future__ import annotations

from typing import Any

from estune.tasks.base import Task


def scores(task: Task, rows: Any, completions: list[str]) -> list[Any]:
    """What a task's first reward gives to a completion of each row."""
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    return list(task.reward_funcs[0](prompts=[""] * len(rows), completions=completions, **columns))

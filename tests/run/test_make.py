"""What a run is made of, from its settings."""

from __future__ import annotations

from pathlib import Path

from estune.config import load
from estune.run.make import make_task

WAITED = """
from estune.pool.waiting import waited_for

train = [{"prompt": str(waited_for())}]
evaluation = [{"prompt": "another"}]


def reward(completions, **_):
    return [0.0] * len(completions)


rewards = [reward]
"""


def test_a_task_that_takes_long_to_make_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(WAITED)
    task = make_task(load(None, [f"task.name={file}"]))
    assert f"making the task {file}" in str(task.train[0])

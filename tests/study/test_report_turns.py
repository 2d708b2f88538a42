"""Rollouts in the report: what was said, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estune.config import load
from estune.journal.journal import Journal
from estune.run.trainer import Trainer
from estune.study.report.tables import read_rows
from estune.study.report.turns import turns_of
from tests.reports import report

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}


def played(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "How much?", "completion": "3", "transcript": json.dumps(messages)}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "p", "completion": "c"}, []),
        ({"prompt": "p", "completion": "c", "transcript": None}, []),
        ({"prompt": "p", "completion": "c", "transcript": "no JSON"}, []),
        ({"prompt": "p", "completion": "c", "transcript": "[3]"}, []),
        (played({"role": "user", "content": "How much?"}, {"role": "assistant", "content": "3"}), []),
        (
            played(
                {"role": "user", "content": "How much?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": [{"type": "text", "text": "3"}]},
                {"role": "assistant", "content": "It is 3."},
            ),
            [("assistant", 'add({"a": 1, "b": 2})'), ("tool", "3"), ("assistant", "It is 3.")],
        ),
        # What the model was shown is more than the prompt: it stays.
        (
            played({"role": "system", "content": "Be short."}, {"role": "assistant", "content": "3"}),
            [("system", "Be short."), ("assistant", "3")],
        ),
    ],
)
def test_the_turns_of_a_transcript(row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert turns_of(row) == turns


def test_a_run_of_two_tries_is_shown_turn_by_turn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = [
        "task=countdown-turns",
        "task.eval_size=8",
        "population=2",
        "prompts_per_step=4",
        "steps=2",
        "eval_steps=1",
    ]
    Trainer(load(None, [*given, "replicas=1", "report_to=none", f"output_dir={run}"]), monitors=[]).train()
    page, parsed = report(run)
    (kept,) = parsed.kept()
    rows = read_rows(run / "completions" / "evaluation-00002.parquet")
    assert len(Journal.read(run).evaluations) == 3
    twice = [row for row in rows if row["turns"] == 2]
    assert twice
    for row in twice:
        first, hint, last = [message["content"] for message in json.loads(row["transcript"])[1:]]
        assert [["assistant", first], ["text", hint], ["assistant", last]] in kept["answers"]
    assert '<p class="who">assistant</p>' in page

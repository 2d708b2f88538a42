"""Rewards that fail, never apply or are not finite: the run stops with one line, or goes on without them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task, run, substance, variety


def test_members_with_infinite_rewards_are_left_out(model: Path, tmp_path: Path) -> None:
    calls = iter(range(1000))

    def sometimes_infinite(completions: list[str], **_: Any) -> list[float]:
        scores = variety(completions)
        return [math.inf, *scores[1:]] if next(calls) == 2 else scores  # call 0 is the first evaluation

    run(make_config(tmp_path / "run", model, steps=1), sometimes_infinite)
    (record,) = Journal.read(tmp_path / "run").steps
    assert [r is None for r in record.rewards].count(True) == 1
    assert record.update.coefficients[record.rewards.index(None)] == 0.0


def failing(kind: str) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        match kind:
            case "raises":
                raise ZeroDivisionError("by zero")
            case "too few":
                return [1.0]
            case "text":
                return ["good"] * len(completions)  # type: ignore[list-item]
            case _:
                return [math.nan] * len(completions)

    return reward


resumed = partial(Trainer.resume, monitors=[], accept_changes=True)  # another reward is what these change


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "raises",
            "reward reward raised ZeroDivisionError: by zero .*test_failing_rewards.py:[0-9]+. on row 0, .*; nothing",
        ),
        ("too few", "reward reward returned 1 values for"),
        ("text", "reward reward returned 'good' .str. for completion 0, not a number or None"),
        ("nan", "no member has a reward"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_loses_nothing(
    model: Path, tmp_path: Path, kind: str, message: str
) -> None:
    run(make_config(tmp_path / "run", model, steps=2))
    with pytest.raises(EstuneError, match=message):
        resumed(tmp_path / "run", steps=4, task=make_task(failing(kind))).train()
    resumed(tmp_path / "run", steps=4, task=make_task()).train()
    run(make_config(tmp_path / "whole", model, steps=4))
    assert substance(Journal.read(tmp_path / "run").steps[3]) == substance(Journal.read(tmp_path / "whole").steps[3])


@pytest.mark.parametrize("score", [math.inf, -math.inf])
def test_an_evaluation_that_cannot_be_compared_stops_with_one_line(model: Path, tmp_path: Path, score: float) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [score, *([1.0] * (len(completions) - 1))]

    with pytest.raises(EstuneError, match="on the evaluation set the reward is not finite"):
        run(make_config(tmp_path / "run", model), broken)


def test_a_reward_that_never_applies_changes_nothing(model: Path, tmp_path: Path) -> None:
    def never(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    run(make_config(tmp_path / "with", model), variety, never)
    run(make_config(tmp_path / "without", model))
    with_it, without = Journal.read(tmp_path / "with"), Journal.read(tmp_path / "without")
    assert [substance(r) for r in with_it.steps] == [substance(r) for r in without.steps]
    assert not any("never" in key for e in with_it.evaluations for key in e.metrics)


def test_tasks_that_cannot_be_graded_are_refused() -> None:
    task = make_task()
    with pytest.raises(EstuneError, match="two reward functions are called variety"):
        make_task(variety, variety)
    with pytest.raises(EstuneError, match="training row 0 has no column prompt, only text"):
        replace(task, train=[{"text": "a"}])
    with pytest.raises(EstuneError, match="training row 1 has the columns prompt, row 0 has prompt, answer"):
        replace(task, train=[{"prompt": "a", "answer": 1}, {"prompt": "b"}])

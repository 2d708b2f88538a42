"""Runs whose rewards are worked out in graders, and what is left of these: nobody."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.grading.modules import load_file as load_module
from estune.journal.journal import Journal
from estune.render import RENDERER
from estune.run.evaluate import evaluate_model
from estune.run.monitors.base import Monitor
from estune.run.trainer import Trainer
from tests.processes import alive, children
from tests.runs import assert_same_run, make_config, make_task, substance, variety

SOURCE = """
import time
from estune.grading import isolated


def odd(text):
    return sum(map(ord, text)) % 13 == 0


def graded(text):
    return len(set(text)) / 10


@isolated(deadline=20.0)
def apart(completions, **_):
    return [graded(text) for text in completions]


@isolated(deadline=1.5, failure_score=-0.5)
def hangs(completions, **_):
    while odd(completions[0]):
        time.sleep(0.1)
    return [graded(completions[0])]


@isolated(deadline=20.0)
def raises(completions, **_):
    if odd(completions[0]):
        raise KeyError("odd")
    return [graded(completions[0])]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Rewards that run in graders, which find them by the path of their file."""
    file = tmp_path_factory.mktemp("rewards") / "isolated_rewards.py"
    file.write_text(SOURCE)
    return load_module(file)


class Watching(Monitor):
    """Notes the graders that a run has, and fails at a step if it is to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.trainer: Trainer | None = None
        self.graders: set[int] = set()

    def on_member_end(self, done: int, population: int) -> None:
        assert self.trainer is not None
        for grading in (self.trainer.grading, *(w.grading for w in self.trainer.evaluations.watched.values())):
            if grading.pool is not None:
                self.graders |= set(grading.pool.pids())

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.on_member_end(0, 0)  # a grader that hung has been replaced
        assert any(map(alive, self.graders))
        if metrics["step"] == self.fail_at:
            raise RuntimeError("the monitor's own")


def processes() -> set[int]:
    """Those that this one has started, but for the one that renders chat templates, which lasts as long as this."""
    renderer = RENDERER.process
    return set(children(os.getpid())) - ({renderer.pid} if renderer else set())


def train_watched(output: Path, model: Path, reward: Any, *, fail_at: int | None = None, **settings: Any) -> set[int]:
    """Train by a reward; the graders there were, of which none may be left."""
    watching, before = Watching(fail_at), processes()
    config = make_config(output, model, **{"graders": 2, "log_completions": 4, **settings})
    watching.trainer = Trainer(config, task=make_task(reward), monitors=[watching])
    try:
        watching.trainer.train()
    finally:
        assert watching.graders
        assert not any(map(alive, watching.graders))
        assert processes() <= before
    return watching.graders


def test_an_evaluation_leaves_no_grader(model: Path, rewards: ModuleType) -> None:
    before = processes()
    overrides = ["graders=2", "max_new_tokens=8"]
    assert evaluate_model(str(model), overrides=overrides, task=make_task(rewards.apart))["eval_reward"] > 0
    assert processes() <= before


def test_rewards_in_graders_give_the_same_run(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    train_watched(tmp_path / "apart", model, rewards.apart)
    Trainer(make_config(tmp_path / "here", model), task=make_task(variety), monitors=[]).train()
    apart, here = Journal.read(tmp_path / "apart"), Journal.read(tmp_path / "here")
    assert [substance(record) for record in apart.steps] == [substance(record) for record in here.steps]
    for record, other in zip(apart.evaluations, here.evaluations, strict=True):
        assert record.metrics["eval_accuracy"] == other.metrics["eval_accuracy"]
    for name in ("final", "best"):
        a, b = (tmp_path / run / name / "model.safetensors" for run in ("apart", "here"))
        assert a.read_bytes() == b.read_bytes()


def completions_of(run: Path, step: int) -> list[list[str]]:
    """The completions of each member of a step."""
    import pyarrow.parquet as pq

    rows = pq.read_table(run / "completions" / f"step-{step:05d}.parquet").to_pylist()
    return [[row["completion"] for row in rows if row["member"] == member] for member in range(4)]


def test_a_grader_that_hangs_does_not_stop_the_run(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    train_watched(tmp_path / "run", model, rewards.hangs, steps=2, eval_steps=0)
    hung = 0
    for record in Journal.read(tmp_path / "run").steps:
        texts = completions_of(tmp_path / "run", record.step + 1)
        scores = [[-0.5 if rewards.odd(text) else rewards.graded(text) for text in of_member] for of_member in texts]
        assert record.rewards == pytest.approx([np.mean(of_member) for of_member in scores])
        expected = sum(rewards.odd(text) for of_member in texts for text in of_member)
        assert record.metrics["rewards/hangs/timeouts"] == expected
        hung += expected
    assert 0 < hung < 10


def test_completions_that_cannot_be_graded_are_left_out_and_counted(
    model: Path, tmp_path: Path, rewards: ModuleType
) -> None:
    train_watched(tmp_path / "run", model, rewards.raises, steps=2, eval_steps=0, reward_errors="exclude")
    failed = 0
    for record in Journal.read(tmp_path / "run").steps:
        texts = completions_of(tmp_path / "run", record.step + 1)
        scores = [[rewards.graded(text) for text in of_member if not rewards.odd(text)] for of_member in texts]
        assert record.rewards == pytest.approx([np.mean(of_member) for of_member in scores])
        expected = sum(rewards.odd(text) for of_member in texts for text in of_member)
        assert record.metrics.get("rewards/raises/errors", 0) == expected
        failed += expected
    assert failed > 0
    # Of the first evaluation's four completions so many can fail: it is a step that ends the run.
    settings = {"steps": 50, "eval_steps": 0, "reward_errors": "exclude", "max_reward_errors": 4}
    with pytest.raises(EstuneError, match="more than max_reward_errors, 4"):
        train_watched(tmp_path / "strict", model, rewards.raises, **settings)


def test_no_grader_is_left_after_an_exception(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    watched = tmp_path / "watched.py"
    watched.write_text(SOURCE + '\ntrain = [{"prompt": "a"}]\nevaluation = [{"prompt": "b"}]\nrewards = [apart]\n')
    with pytest.raises(RuntimeError, match="the monitor's own"):
        train_watched(tmp_path / "run", model, rewards.apart, fail_at=1, watch=str(watched))
    before = processes()
    task = make_task(rewards.apart, gold=lambda row: "a")
    with pytest.raises(EstuneError, match="the gold answer of training row 0 should get 1, but apart gives 0.1"):
        Trainer(make_config(tmp_path / "never", model, graders=2), task=task, monitors=[])
    assert processes() <= before


def test_a_finished_run_with_graders_can_go_on(model: Path, tmp_path: Path, rewards: ModuleType) -> None:
    task = make_task(rewards.apart)
    Trainer(make_config(tmp_path / "run", model, graders=1), task=task, monitors=[]).train()
    Trainer.resume(tmp_path / "run", steps=6, graders=2, task=task, monitors=[]).train()
    Trainer(make_config(tmp_path / "whole", model, steps=6, graders=2), task=task, monitors=[]).train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")

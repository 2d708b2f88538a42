"""Runs that go back: a step that harms is taken back, and after a poor evaluation the best one's weights go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from estune.journal.journal import Journal
from estune.journal.log import log
from estune.journal.records import EvaluationRecord
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.run.branch import branch
from estune.run.directory import RunDirectory
from estune.run.guard import falls_short
from estune.run.trainer import Trainer
from tests.runs import cut, make_config, make_task, train


@pytest.mark.parametrize(
    "where",
    [{}, {"replicas": 2}, {"prompt_groups": 2, "prompts_per_step": 3, "per_prompt": "center"}],
    ids=["one", "replicas", "groups"],
)
def test_a_step_that_harms_is_taken_back_to_the_bit(model: Path, tmp_path: Path, where: dict[str, Any]) -> None:
    """And by workers: `tests/pool/test_ray_pool.py`."""
    assert_harm_is_taken_back(model, tmp_path, where)


def assert_harm_is_taken_back(model: Path, tmp_path: Path, where: dict[str, Any]) -> None:
    """Steps so large that some harm, and that those after them add a share of the steps before."""
    changes = {"guard": 0.0, "learning_rate": 0.1, "momentum": 0.5, "save_steps": 2, "steps": 5, **where}
    train(tmp_path / "run", model, **changes)
    steps = Journal.read(tmp_path / "run").steps
    taken_back = [record for record in steps if record.metrics["taken_back"]]
    assert taken_back
    before = [Journal.read(tmp_path / "run").header.fingerprint, *(record.fingerprint for record in steps)]
    for record in taken_back:
        assert record.metrics["reward_after"] < record.metrics["reward_base"]
        assert record.fingerprint == before[record.step]
        assert not any(record.update.coefficients)
    rates = [record.learning_rate for record in steps]
    assert rates[taken_back[0].step + 1] == rates[taken_back[0].step] / 2
    assert replay(tmp_path / "run", tmp_path / "replayed") == before[-1]
    if "replicas" in where:
        train(tmp_path / "one", model, **changes | {"replicas": 1, "workers": None})
        assert [r.fingerprint for r in Journal.read(tmp_path / "one").steps] == before[1:]
    else:
        cut(tmp_path / "run", tmp_path / "cut", taken_back[0].step + 1)
        summary = Trainer.resume(tmp_path / "cut", task=make_task(), monitors=[]).train()
        assert [r.fingerprint for r in Journal.read(tmp_path / "cut").steps] == before[1:]
        assert (summary.taken_back, summary.back) == (len(taken_back), 0)


def test_a_base_that_has_no_reward_in_one_group_is_said_to_have_none(model: Path, tmp_path: Path) -> None:
    def some(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [None if prompt[0] in "35" else len(text) for prompt, text in zip(prompts, completions, strict=True)]

    task = make_task(some)
    config = make_config(
        tmp_path / "run", model, steps=4, population=4, prompt_groups=2, prompts_per_step=1, evaluate_base=True
    )
    Trainer(config, task=task, monitors=[]).train()
    steps = Journal.read(tmp_path / "run").steps
    partly = [any(task.train[i]["prompt"][0] in "35" for i in record.prompts) for record in steps]
    assert any(partly)
    assert ["reward_base" not in record.metrics for record in steps] == partly


def test_tokens_of_the_guards_second_look_count(model: Path, tmp_path: Path) -> None:
    """Of completions that all are as long as they may be, by four members and the base, and then the base again."""
    changes = {"steps": 1, "prompts_per_step": 3, "max_new_tokens": 2}
    train(tmp_path / "run", model, guard=100.0, **changes)
    (record,) = Journal.read(tmp_path / "run").steps
    assert record.metrics["completions/clipped_ratio"] == 1.0
    assert record.metrics["num_tokens"] == (4 + 1 + 1) * 3 * 2


@pytest.mark.parametrize(
    "where",
    [{}, {"replicas": 2}, {"adam": True, "constraint": "rewards/variety/mean>=9"}],
    ids=["one", "replicas", "adam and a constraint"],
)
def test_a_run_goes_back_to_its_best_to_the_bit(
    model: Path, tmp_path: Path, where: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Steps so large that some evaluations are worse than the best before."""
    changes = {"back_to_best": 0.0, "learning_rate": 0.1, "save_steps": 1, "steps": 10, **where}
    run = tmp_path / "run"
    train(run, model, **changes)
    journal = Journal.read(run)
    back = [e for e in journal.evaluations if e.back is not None]
    assert back
    assert back[-1].step < 10  # at the end there is nothing to go on with
    said = [record.message for record in caplog.records if "back to the weights there" in record.message]
    assert [line.split(":")[0] for line in said] == [f"step {e.step}" for e in back]
    for e in back:
        best = max(o.metrics["eval_accuracy"] for o in journal.evaluations if o.step < e.step)
        assert e.metrics["eval_accuracy"] < best
        assert best == next(o for o in journal.evaluations if o.step == e.back).metrics["eval_accuracy"]
        assert journal.fingerprint(e.step) == journal.fingerprint(e.back)
        after = journal.steps[e.step]
        assert after.learning_rate == journal.steps[e.step - 1].learning_rate / 2
        if "constraint" in where and e.step not in journal.undone:  # half of the violation, which is at most 1
            assert 0 < after.state["penalty"] - e.state.get("penalty", 0.0) <= 0.5
        earlier = Journal.read(run, e.step - 1)  # before it was taken back
        assert earlier.fingerprint() != journal.fingerprint(e.step)
        assert replay(run, tmp_path / f"step {e.step - 1}", step=e.step - 1) == earlier.fingerprint()
    assert replay(run, tmp_path / "replayed") == journal.fingerprint()
    assert set(RunDirectory(run).checkpoints()) == set(range(1, 11)) - {i + 1 for i in journal.undone}
    assert verify(run).steps == 10
    rows = {(row["kind"], row["step"]): row for row in log(run)}
    assert {i for i in range(10) if rows["step", i + 1].get("undone")} == journal.undone
    assert rows["evaluation", back[0].step]["back"] == back[0].back
    if "replicas" in where:
        assert train(tmp_path / "one", model, **changes | {"replicas": 1}) == [r.fingerprint for r in journal.steps]
        return
    for steps in (back[0].step - 1, back[0].step, back[0].step + 1):
        cut(run, tmp_path / f"cut {steps}", steps)
        summary = Trainer.resume(tmp_path / f"cut {steps}", task=make_task(), monitors=[]).train()
        assert (summary.taken_back, summary.back) == (0, len(back))
        found = Journal.read(tmp_path / f"cut {steps}")
        assert [(r.fingerprint, r.state) for r in found.steps] == [(r.fingerprint, r.state) for r in journal.steps]
        checkpoints = RunDirectory(tmp_path / f"cut {steps}").checkpoints()
        assert not {number - 1 for number in checkpoints} & found.undone
        assert [(e.step, e.back, e.state) for e in found.evaluations] == [
            (e.step, e.back, e.state) for e in journal.evaluations
        ]
    branch(run, back[0].step, task=make_task(), monitors=[], steps=2, output_dir=tmp_path / "branch").train()
    assert verify(tmp_path / "branch").steps == back[0].step + 2


@pytest.mark.parametrize(
    ("accuracy", "most", "short"), [(0.5, 0.0, False), (0.49, 0.0, True), (0.45, 0.1, False), (0.39, 0.1, True)]
)
def test_an_evaluation_falls_short_by_more_than_is_allowed(accuracy: float, most: float, short: bool) -> None:
    """In the metric that tells the best first, whatever the others say."""
    best = EvaluationRecord(2, {"eval_accuracy": 0.5, "eval_reward": 1.0})
    now = EvaluationRecord(4, {"eval_accuracy": accuracy, "eval_reward": 2.0})
    assert falls_short(now, best, ["eval_accuracy", "eval_reward"], most) is short

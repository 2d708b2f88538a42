"""What a run says unasked: once, in one line, and only where there is cause."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, StepRecord
from estune.journal.replay import replay
from estune.run.order import StagedOrder
from estune.run.remarks import before, collapse, collapsing, far_from_base, members_alike, never_right
from estune.run.trainer import Trainer
from estune.tasks.base import Stage, Task
from tests.runs import PROMPTS, make_config, make_task, variety

ASSISTANT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def said(task: Task, **settings: Any) -> list[str]:
    config = make_config(Path(), Path("any"), **settings)
    remarks = list(before(config, task, StagedOrder(len(task.train), task.stages, config.prompts_per_step, 0)))
    assert not any("\n" in remark for remark in remarks)
    return remarks


def step(number: int, *rewards: float | None) -> StepRecord:
    members = tuple(Member(i) for i in range(len(rewards)))
    update = Update(number, members, (0.0,) * len(rewards), sigma=0.1)
    return StepRecord(update, 0.1, list(rewards), [0], "ab")


def test_members_are_alike_whatever_the_base_has() -> None:
    steps = []
    for number in range(3):
        record = step(number, 0.5, 0.5, 0.9)
        members = (*record.update.members[:2], Member(9, 0))
        steps.append(replace(record, update=replace(record.update, members=members)))
    assert "all members have had one reward (0.5 " in (members_alike(steps) or "")


def evaluation(number: int, accuracy: float) -> EvaluationRecord:
    return EvaluationRecord(number, {"eval_accuracy": accuracy, "eval_completions/clipped_ratio": 0.25})


@pytest.mark.parametrize(
    ("length", "distinct", "expected"),
    [
        (40.0, 0.9, None),
        (10.0, 0.225, None),
        (40.1, 0.9, "completions take 40.1 tokens, 10.0 in the first step"),
        (2.4, 0.9, "completions take 2.4 tokens, 10.0 in the first step"),
        (10.0, 0.2, "completions are hardly different any more (20%, 90% in the first step)"),
        (1.0, 0.1, "completions take 1.0 tokens, 10.0 in the first step and are hardly different any more"),
    ],
)
def test_completions_that_become_others_altogether(length: float, distinct: float, expected: str | None) -> None:
    def looking(number: int, mean_length: float, share: float) -> StepRecord:
        metrics = {"completions/mean_length": mean_length, "completions/distinct": share}
        return replace(step(number, 0.5, 0.6), metrics=metrics)

    found = collapsing([looking(0, 10.0, 0.9), step(1, 0.5, 0.6), looking(2, length, distinct)])
    assert found is None if expected is None else expected in (found or "")
    assert collapsing([step(0, 0.5, 0.6), looking(1, 9.0, 0.1)]) is None


def test_a_model_far_from_its_base() -> None:
    assert far_from_base(EvaluationRecord(4, {"eval_accuracy": 1.0})) is None
    assert far_from_base(EvaluationRecord(4, {"eval_accuracy": 1.0, "eval_kl": 1.0})) is None
    assert "1.5 nats a token" in (far_from_base(EvaluationRecord(4, {"eval_accuracy": 1.0, "eval_kl": 1.5})) or "")


def test_what_a_run_has_gone_back_from_is_no_collapse() -> None:
    far = EvaluationRecord(3, {"eval_accuracy": 0.0, "eval_kl": 1.5})
    steps = [step(number, 0.5, 0.5) for number in range(3)]
    assert collapse(steps, [evaluation(0, 1.0), far]).keys() == {"members", "distance"}
    back = replace(far, back=0)
    assert not collapse(steps, [evaluation(0, 1.0), back])
    assert not collapse([*steps, step(3, 0.5, 0.5)], [evaluation(0, 1.0), back])
    again = [*steps, *(step(number, 0.5, 0.5) for number in (3, 4, 5))]
    assert collapse(again, [evaluation(0, 1.0), back]).keys() == {"members"}


@pytest.mark.parametrize(
    ("settings", "never"),
    [
        ({"steps": 4, "eval_steps": 4}, True),
        ({"steps": 4, "eval_steps": 3}, False),
        ({"steps": 4, "eval_steps": 3, "sam_rho": 0.5}, True),
        ({"steps": 4, "eval_steps": 3, "eval_on_start": False}, True),
        ({"steps": 7, "eval_steps": 3, "eval_on_start": False}, False),
    ],
)
def test_an_evaluation_that_nothing_is_compared_with(settings: dict[str, Any], never: bool) -> None:
    remarks = [each for each in said(make_task(), back_to_best=0.05, **settings) if "back_to_best" in each]
    assert len(remarks) == never
    assert all("lower eval_steps" in each for each in remarks)


def test_going_back_without_held_out_rows() -> None:
    remarks = said(replace(make_task(), evaluation=[], accuracy=None), back_to_best=0.05, steps=4, eval_steps=1)
    assert any("has no held-out rows: it will do nothing" in each for each in remarks)


def test_fewer_prompts_than_a_step_asks_for() -> None:
    count = len(PROMPTS) - 4
    assert said(make_task(), prompts_per_step=count) == []
    expected = f"prompts_per_step is {count + 1}, and the training set has {count} rows: every step uses all of them"
    assert said(make_task(), prompts_per_step=count + 1) == [expected]
    staged = make_task(stages=[Stage(range(2), 1), Stage(range(count))])
    assert said(staged, prompts_per_step=6) == [
        "prompts_per_step is 6, and a stage has 2 rows: every step uses all of them"
    ]


def test_an_answer_that_was_left_in_the_prompt() -> None:
    task = make_task()
    mixed = replace(task, train=[{"prompt": ASSISTANT}, {"prompt": ASSISTANT[:1]}, *task.train])
    (remark,) = said(mixed)
    assert remark.startswith("task variety: 1 of 22 training prompts end with words of the assistant's")


def test_values_that_rewards_share() -> None:
    """Each call gets copies, where there can be one."""
    held = [{"a": [n, {"b": (n,)}], "lock": threading.Lock()} for n in range(2)]
    task = make_task()
    task = replace(task, train=[{**row, "own": held} for row in task.train])
    (remark,) = said(task)
    assert remark.startswith("task variety: column own has <unlocked _thread.lock object at ")
    assert said(replace(task, train=[{**row, "own": [{"a": np.ones(2)}]} for row in task.train])) == []


def test_completions_of_an_evaluation_that_are_all_alike() -> None:
    assert said(make_task(), eval_samples=4, eval_temperature=1.0) == []
    assert said(make_task(), eval_samples=4, temperature=1.0) == []
    (remark,) = said(make_task(), eval_samples=4)
    # The setting has another name in TRL.
    assert remark == (
        "4 completions of each held-out prompt are asked for, and greedy ones are all alike: one is generated; "
        "eval_temperature=0.8 draws different ones"
    )


def test_members_that_are_alike() -> None:
    alike = [step(0, 0.5, 0.5), step(1, 0.0, None, 0.0), step(2, 1.0, 1.0)]
    found = members_alike([step(0, 1.0, 2.0), *alike])
    assert found is not None
    assert found.startswith("step 3: all members have had one reward (1 in this step) for 3 steps")
    assert members_alike([*alike[:2], step(2, 0.1 + 0.2, 0.3)]) is not None
    assert members_alike(alike[:2]) is None
    assert members_alike([*alike[:2], step(2, 1.0, 2.0)]) is None


def test_an_accuracy_that_is_never_above_zero() -> None:
    task = make_task()
    zeros = [evaluation(0, 0.0), evaluation(10, 0.0), evaluation(20, 0.0)]
    assert never_right(task, zeros[:2], over=False) is None
    assert never_right(task, zeros[:1], over=True) is None
    assert never_right(task, [*zeros, evaluation(30, 0.1)], over=True) is None
    for found in (never_right(task, zeros, over=False), never_right(task, zeros[1:], over=True)):
        assert found is not None
        assert found.startswith("step 20: variety has been 0 at all")
        assert "25% of completions cut off" in found
        assert found.endswith("completions/evaluation-00020.parquet")


def test_a_run_says_each_once(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nothing(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    config = make_config(tmp_path / "run", model, steps=5, eval_steps=1, prompts_per_step=99, eval_on_start=False)
    trainer = Trainer(config, task=make_task(nothing), monitors=[])
    trainer.train()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("estune.run.")]
    assert [message.partition(",")[0].partition(" (")[0] for message in ours] == [
        "prompts_per_step is 99",
        "step 3: all members have had one reward",
        "step 3: nothing has been 0 at all 3 evaluations",
    ]
    assert [e.step for e in trainer.journal.evaluations] == [1, 2, 3, 4, 5]


def test_a_run_that_collapses_ends_and_goes_on_where_it_is_told_to(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rewards are all alike from step 3 on, so that step 5 is the third of these."""

    def until(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return variety(completions) if trainer_state.global_step < 2 else [0.5] * len(completions)

    config = make_config(tmp_path / "run", model, steps=8, save_steps=1, stop_on_collapse=True)
    summary = Trainer(config, task=make_task(until), monitors=[]).train()
    journal = Journal.read(tmp_path / "run")
    assert (summary.ended, summary.steps, journal.ended, len(journal.steps)) == ("stopped early", 5, "stopped early", 5)
    assert summary.best["step"] <= 4
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("estune.run.")]
    assert texts[-2].startswith("step 5: all members have had one reward (0.5 in this step)")
    assert texts[-1].startswith("stopped, as it has collapsed; ")

    still = Trainer.resume(tmp_path / "run", task=make_task(until), monitors=[]).train()
    assert (still.ended, still.steps) == ("stopped early", 5)
    on = Trainer.resume(tmp_path / "run", task=make_task(until), monitors=[], stop_on_collapse=False).train()
    assert (on.ended, on.steps) == ("finished", 8)
    assert replay(tmp_path / "run", tmp_path / "replayed") == Journal.read(tmp_path / "run").fingerprint()

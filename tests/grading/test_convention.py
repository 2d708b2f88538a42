"""Reward functions under TRL's calling convention."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.grading.convention import TrainerState
from estune.grading.grading import Grading, grade
from estune.rewards.load import load_reward
from estune.run.graded import evaluation_metrics, grade_completions
from estune.tasks.preflight import preflight
from tests.grading.functions import COMPLETIONS, ROWS, half_of_even, right, task_of


def test_functions_are_called_as_trl_calls_them() -> None:
    seen: dict[str, Any] = {}

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0] * 3

    grade([reward], [1.0], ROWS, COMPLETIONS)
    assert seen["prompts"] == ["one", "two", "three"]
    assert seen["completions"] == ["1", "x", "3"]
    assert seen["completion_ids"] == [[7, 8, 0], [7, 8, 1], [7, 8, 2]]
    assert seen["answer"] == [1, 2, 3]
    chat = [{"prompt": [{"role": "user", "content": "one"}]}]
    grade([lambda **a: seen.update(a) or [0.0]], [1.0], chat, COMPLETIONS[:1])
    assert seen["completions"] == [[{"role": "assistant", "content": "1"}]]


def test_weights_and_what_does_not_apply() -> None:
    grades = grade([right, half_of_even], [1.0, 0.1], ROWS, COMPLETIONS)
    assert grades.total == [1.0, pytest.approx(0.05), 1.0]
    assert grades.mean == pytest.approx(2.05 / 3)
    assert grades.means() == {"right": pytest.approx(2 / 3), "half_of_even": 0.5}
    only = grade([half_of_even], [1.0], ROWS, COMPLETIONS)
    assert only.total == [None, 0.5, None]
    assert only.mean == 0.5
    nothing = grade([lambda **_: [None] * 3], [1.0], ROWS, COMPLETIONS)
    assert nothing.mean is None


def test_nan_does_not_apply(caplog: pytest.LogCaptureFixture) -> None:
    """As TRL's sum over functions, `nansum`: a completion for which all are NaN or None does not count."""

    async def some(**_: Any) -> list[float | None]:
        return [math.nan, 0.5, None]

    def others(**_: Any) -> list[float | None]:
        return [None, 1.0, math.nan]

    grades = grade([right, some], [1.0, 2.0], ROWS, COMPLETIONS)
    assert grades.total == [1.0, 1.0, 1.0]
    assert grades.scores["some"] == [None, 0.5, None]
    assert grade([others, some], [1.0, 2.0], ROWS, COMPLETIONS).total == [None, 2.0, None]
    assert not caplog.records
    with Grading([lambda **_: [math.nan] * 3]) as grading:
        assert [grading.grade(ROWS, COMPLETIONS).mean for _ in range(3)] == [None] * 3
    assert caplog.text.count("no reward applies to any of 3 completions, such as '1'") == 1


def test_no_call_sees_what_another_changed() -> None:
    rows = [{"prompt": [{"role": "user", "content": "p"}], "own": [n, [n]], "more": {"a": [n]}} for n in range(3)]
    before = repr(rows)

    def takes(prompts: Any, completions: Any, own: Any, more: Any, completion_ids: Any, **_: Any) -> list[float]:
        sizes = [len(o) + len(o[1]) + len(m["a"]) + len(p) + len(c) + len(i) for o, m, p, c, i in
                 zip(own, more, prompts, completions, completion_ids, strict=True)]  # fmt: skip
        for o, m, p, c, i in zip(own, more, prompts, completions, completion_ids, strict=True):
            o.pop().pop()
            m["a"].clear()
            p[0]["content"] = ""
            p.pop()
            c.pop()
            i.clear()
        own.clear()
        return [float(size) for size in sizes]

    def takes_again(**columns: Any) -> list[float]:
        return takes(**columns)

    async def takes_too(**columns: Any) -> list[float]:
        return takes(**columns)

    with Grading([takes, functools.partial(takes_again), takes_too]) as grading:
        for _ in range(2):
            scores = grading.grade(rows, COMPLETIONS).scores
            assert set(map(tuple, scores.values())) == {(9.0, 9.0, 9.0)}
    assert repr(rows) == before
    assert [c.token_ids for c in COMPLETIONS] == [[7, 8, 0], [7, 8, 1], [7, 8, 2]]


def test_no_call_sees_what_another_changed_of_other_kinds() -> None:
    """A tuple, a set and an array, which are copied as they are, and what is told of the run."""
    rows = [{"prompt": "p", "pair": ({n}, np.ones(2))} for n in range(3)]
    state = TrainerState(global_step=3)

    def takes(pair: Any, trainer_state: TrainerState, **_: Any) -> list[float]:
        found = [float(len(members) + array.sum() + trainer_state.global_step) for members, array in pair]
        for members, array in pair:
            members.clear()
            array[:] = 0
        trainer_state.global_step = 0
        return found

    def takes_again(**columns: Any) -> list[float]:
        return takes(**columns)

    with Grading([takes, takes_again], state=state) as grading:
        for _ in range(2):
            assert grading.grade(rows, COMPLETIONS).scores == {"takes": [6.0] * 3, "takes_again": [6.0] * 3}


def test_everything_trl_passes_is_passed() -> None:
    seen: dict[str, Any] = {}
    state = TrainerState(global_step=3, max_steps=10, epoch=0.5)
    rows = [{**row, "completion": "gold", "completion_ids": [1]} for row in ROWS]
    with Grading([lambda **a: seen.update(a) or [0.0] * 3], state=state) as grading:
        grading.grade(rows, COMPLETIONS)
    assert seen.keys() == {
        *("prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric")
    }
    assert seen["trainer_state"] == state
    assert seen["completion_ids"] == [c.token_ids for c in COMPLETIONS]


def test_a_function_that_does_not_take_all_is_told_how() -> None:
    """TRL passes everything too, and lets the TypeError through."""

    def short(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(EstuneError, match=r"reward short raised TypeError: .* end its parameters with \*\*kwargs"):
        grade([short], [1.0], ROWS, COMPLETIONS)


def test_async_functions_are_gathered_and_batches_overlap() -> None:
    threads = set()

    def meets(barrier: asyncio.Event, other: asyncio.Event) -> Callable[..., Any]:
        async def reward(**_: Any) -> list[float]:
            threads.add(threading.current_thread())
            barrier.set()
            await asyncio.wait_for(other.wait(), 5)
            return [1.0] * 3

        return reward

    class Judge:
        async def __call__(self, answer: list[int], **_: Any) -> list[float | None]:
            return [float(a) if a > 1 else None for a in answer]

    one, two = asyncio.Event(), asyncio.Event()
    first, second = meets(one, two), meets(two, one)
    first.__name__, second.__name__ = "first", "second"
    with Grading([first, Judge(), second], [1.0, 0.5, 1.0]) as grading:
        pending = [grading.submit(ROWS, COMPLETIONS) for _ in range(2)]
        assert [p.result().total for p in pending] == [[2.0, 3.0, 3.5]] * 2
        assert pending[0].result().scores["Judge"] == [None, 2.0, 3.0]
    assert len(threads) == 1
    thread = threads.pop()
    assert thread is not threading.current_thread()
    thread.join(5)
    assert not thread.is_alive()


def test_plain_functions_run_in_the_callers_thread_in_order() -> None:
    calls: list[Any] = []

    def note(prompts: list[str], **_: Any) -> list[float]:
        calls.append((threading.current_thread(), prompts[0]))
        return [0.0] * len(prompts)

    with Grading([note]) as grading:
        pending = [grading.submit(ROWS[i : i + 1], COMPLETIONS[i : i + 1]) for i in range(3)]
        assert calls == [(threading.current_thread(), row["prompt"]) for row in ROWS]
        assert [p.result().total for p in reversed(pending)] == [[0.0]] * 3


def test_partials_go_by_the_name_they_wrap() -> None:
    bound = functools.partial(right, unused=1)
    assert grade([bound], [1.0], ROWS, COMPLETIONS).scores == {"right": [1.0, 0.0, 1.0]}


def test_accuracy_of_an_evaluation_by_group() -> None:
    task = task_of([right], group="kind")
    metrics = evaluation_metrics(task, grade_completions(task, task.evaluation, COMPLETIONS))
    assert metrics["eval_accuracy"] == pytest.approx(2 / 3)
    assert (metrics["eval_accuracy/odd"], metrics["eval_accuracy/even"]) == (1.0, 0.0)


def test_preflight_grades_gold_answers() -> None:
    good = task_of([right], gold=lambda row: str(row["answer"]))
    with Grading([right]) as grading:
        assert preflight(good, grading) == 6
        assert preflight(good, grading, rows=1) == 2
        assert preflight(task_of([right]), grading) == 0
        assert preflight(replace(good, evaluation=[], accuracy=None), grading) == 0  # nothing says what is right
        some = task_of([right], gold=lambda row: "3" if row["answer"] == 3 else None)
        assert preflight(some, grading) == 2
        bad = task_of([right], gold=lambda row: f"#### {row['answer']}")
        with pytest.raises(
            EstuneError, match="gold answer of training row 0 should get 1, but right gives 0: '#### 1'"
        ):
            preflight(bad, grading)
    with (
        Grading([half_of_even]) as grading,
        pytest.raises(EstuneError, match="training row 0 should get 1, but no reward applies"),
    ):
        preflight(task_of([half_of_even], gold=str), grading)


def test_rewards_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_reward(right) is right
    assert load_reward("tests.grading.functions.right") is not None
    (tmp_path / "mine.py").write_text("def good(completions, **_):\n    return [1.0] * len(completions)\n")
    by_path: Any = load_reward(f"{tmp_path}/mine.py:good")
    assert by_path(completions=[1, 2]) == [1.0, 1.0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/"])
    by_name: Any = load_reward("mine.good")
    assert by_name(completions=[1]) == [1.0]
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, message in {
        "good": "is no name of a reward",
        "no.such.function": "No module named 'no'",
        "mine.bad": "has no function bad",
        "mine.py:bad": "has no function bad",
        "none.py:good": "no such file",
        "broken.py:good": "broken.py cannot be loaded: ZeroDivisionError",
    }.items():
        with pytest.raises(EstuneError, match=message):
            load_reward(name)
    with pytest.raises(EstuneError, match="a reward is int"):
        load_reward(3)

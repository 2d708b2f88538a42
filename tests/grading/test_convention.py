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
import pyarrow.parquet
import pytest
import torch

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.convention import Log, TrainerState, weighted
from estune.grading.grading import Grading, grade
from estune.rewards.load import load_reward
from estune.run.graded import evaluation_metrics, grade_completions, step_metrics, write_completions
from estune.tasks.base import Task
from estune.tasks.preflight import preflight

ROWS = [{"prompt": "one", "answer": 1}, {"prompt": "two", "answer": 2}, {"prompt": "three", "answer": 3}]
COMPLETIONS = [Completion(text, [7, 8, i], True) for i, text in enumerate(["1", "x", "3"])]


def right(prompts: Any, completions: list[str], answer: list[int], **_: Any) -> list[float]:
    return [float(text == str(a)) for text, a in zip(completions, answer, strict=True)]


def half_of_even(answer: list[int], **_: Any) -> list[float | None]:
    return [0.5 if a % 2 == 0 else None for a in answer]


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


@pytest.mark.parametrize("bad", [math.inf, -1e308, 10**400])
def test_scores_that_are_no_numbers_fail_the_member(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    grades = grade([lambda **_: [1.0, bad, 1.0]], [1.0], ROWS, COMPLETIONS)
    assert grades.mean is None
    assert "'x'" in caplog.text


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


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (
            {"a": 1.0, "b": 2.0, "c": 3.0},
            r"{'a': 1.0, 'b': 2.0, 'c': 3.0} \(dict\), not a list of numbers",
        ),
        ("123", r"'123' \(str\)"),
        (b"123", r"b'123' \(bytes\)"),
        ({1.0, 2.0, 3.0}, r"\(set\)"),
        (None, r"None \(NoneType\)"),
        (1.0, r"1.0 \(float\)"),
        (["1", "2", "3"], r"'1' \(str\) for completion 0, not a number or None"),
        ([1.0, b"2", 3.0], r"b'2' \(bytes\) for completion 1"),
        ([1.0, 2.0, {"score": 1}], r"{'score': 1} \(dict\) for completion 2"),
        ([1.0, [2.0], 3.0], r"\[2.0\] \(list\) for completion 1"),
        ([1.0, 1j, 3.0], r"\(complex\) for completion 1"),
        (memoryview(b"123"), r"\(memoryview\), not a list"),
        (np.array(1.0), r"array\(1\.\) \(ndarray\), not a list"),
        (np.ones((3, 1)), r"array\(\[1\.\]\) \(ndarray\) for completion 0"),
        (np.ones(3, complex), r"\(complex128\) for completion 0"),
        (torch.tensor(1.0), r"tensor\(1\.\) \(Tensor\), not a list"),
        (torch.ones(3, 1), r"tensor\(\[1\.\]\) \(Tensor\) for completion 0"),
        (torch.ones(3, device="meta"), r"\(Tensor\) for completion 0"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(returned: Any, complaint: str) -> None:
    def reward(**_: Any) -> Any:
        return returned

    with pytest.raises(EstuneError, match=f"reward reward returned .*{complaint}"):
        grade([reward], [1.0], ROWS, COMPLETIONS)


def test_mistakes_are_one_line() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("numbers")

    with pytest.raises(EstuneError, match="reward broken raised KeyError: 'numbers'"):
        grade([broken], [1.0], ROWS, COMPLETIONS)
    with pytest.raises(EstuneError, match="returned 2 values for 3 completions"):
        grade([lambda **_: [1.0, 2.0]], [1.0], ROWS, COMPLETIONS)


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


def task_of(functions: list[Any], **more: Any) -> Task:
    rows = [{**row, "kind": "odd" if row["answer"] % 2 else "even"} for row in ROWS]
    evaluation = [{**row, "prompt": row["prompt"] + "?"} for row in rows]
    weights = [1.0] * len(functions)
    return Task("sum", rows, evaluation, functions, weights, functions[0].__name__, **more)


def test_what_functions_log_goes_to_records_and_metrics(tmp_path: Path) -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("extracted", [text if text.isdigit() else 7 for text in completions])
        log_metric("depth", 1.0)
        log_metric("depth", 2.0)
        return [1.0] * len(completions)

    task = task_of([logs])
    graded = grade_completions(task, task.train, COMPLETIONS)
    assert graded.metrics()["depth"] == 1.5
    write_completions(tmp_path / "some.parquet", graded.records(step=1))
    table = pyarrow.parquet.read_table(tmp_path / "some.parquet").to_pydict()
    assert table["extracted"] == ["1", "7", "3"]  # values of two types: a text each
    assert table["step"] == [1, 1, 1]


def test_numbers_that_cannot_be_added_up_count_as_infinite() -> None:
    def huge(log_metric: Any, **_: Any) -> list[float]:
        log_metric("depth", 1e308)
        log_metric("depth", 2.0)
        return [1e308, -1e308, 1e100]

    task = task_of([huge])
    graded = grade_completions(task, task.train, COMPLETIONS)
    assert graded.grades.scores == {"huge": [math.inf, -math.inf, 1e100]}
    assert (graded.grades.mean, graded.metrics()["depth"]) == (None, 2.0)
    assert math.isnan(weighted([1.0, 1.0], [1e308, 1e308]) or 0.0)


@pytest.mark.parametrize("value", [{}, [{}], 10**20, "\ud800", {"a": {}}, "\x00"])
def test_whatever_is_logged_can_be_written(value: Any, tmp_path: Path) -> None:
    write_completions(tmp_path / "some.parquet", [{"step": 1, "note": value}, {"step": 1, "note": value}])
    table = pyarrow.parquet.read_table(tmp_path / "some.parquet").to_pydict()
    assert table == {"step": [1, 1], "note": [str(value).replace("\ud800", "?")] * 2}


def test_names_of_what_is_logged_move_no_cursor() -> None:
    log = Log(1)
    log.extra("a\x1b[2J", [1])
    log.metric("b\x1b[2J", 1)
    assert (log.extras, log.metrics) == ({"a?[2J": [1]}, {"b?[2J": [1.0]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda extra, metric: extra("note", [1]), "1 values for 3 completions"),
        (lambda extra, metric: extra("reward", [1] * 3), "a column of estune's own"),
        (lambda extra, metric: metric("reward", 1.0), "estune's own metrics"),
        (lambda extra, metric: metric("eval_depth", 1.0), "estune's own metrics"),
        (lambda extra, metric: metric("depth", "deep"), "could not convert string to float"),
    ],
)
def test_bad_logging_is_refused(call: Any, message: str) -> None:
    def logs(log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        call(log_extra, log_metric)
        return [1.0] * 3

    with pytest.raises(EstuneError, match=message):
        grade([logs], [1.0], ROWS, COMPLETIONS)


def fails_on_two(answer: list[int], **_: Any) -> list[float]:
    return [1 / (a - 2) for a in answer]


def test_an_error_names_the_row() -> None:
    with pytest.raises(
        EstuneError, match=r"raised ZeroDivisionError: division by zero \(\S*test_convention.py:\d+\) on row 1, 'x'"
    ):
        grade([fails_on_two], [1.0], ROWS, COMPLETIONS)


def test_a_batch_that_fails_can_be_left_out_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Not one by one: a function that compares completions would give other scores then. None counts, none is zero."""
    with Grading([right, fails_on_two], errors="exclude", max_errors=2) as grading:
        grades = grading.grade(ROWS, COMPLETIONS)
        assert grades.total == [None] * 3
        assert grades.mean is None
        assert grades.failures == {"fails_on_two": {"errors": 3}}
        assert "left out" in caplog.text
        assert grading.grade(ROWS[:1], COMPLETIONS[:1]).total == [0.0]
        grading.grade(ROWS, COMPLETIONS)  # a failed call counts once, however many completions it was to grade
        with pytest.raises(
            EstuneError, match=r"3 calls of rewards failed, more than max_reward_errors, 2.*accept_changes=T"
        ):
            grading.grade(ROWS, COMPLETIONS)


def test_failures_of_a_step_are_added_up() -> None:
    task = task_of([right, fails_on_two])
    with Grading(task.reward_funcs, errors="exclude") as grading:
        members = [
            grade_completions(task, task.train[:1], COMPLETIONS[:1], grading),
            grade_completions(task, task.train, COMPLETIONS, grading),
            grade_completions(task, task.train, COMPLETIONS, grading),
        ]
    metrics = step_metrics(members)
    assert metrics["rewards/fails_on_two/errors"] == 6
    assert metrics["rewards/right/mean"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert metrics["failed_members"] == 2


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
    assert load_reward("tests.grading.test_convention.right") is not None
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


def test_an_exception_in_the_place_of_a_score_is_that_completions_error() -> None:
    """Others of its batch keep their scores, whatever kind the function is."""

    def some(completions: list[str], **_: Any) -> list[float | Exception | None]:
        return [ValueError("no x") if text == "x" else 1.0 for text in completions]

    async def asked(completions: list[str], **_: Any) -> list[float | Exception | None]:
        return some(completions)

    for function in (some, asked, functools.partial(some)):
        with pytest.raises(EstuneError, match=r"reward \w+ raised ValueError: no x on row 1, 'x'; nothing is lost"):
            grade([function], [1.0], ROWS, COMPLETIONS)
        with Grading([right, function], errors="exclude", max_errors=1) as grading:
            grades = grading.grade(ROWS, COMPLETIONS)
            assert grades.total == [2.0, None, 2.0]
            assert list(grades.failures.values()) == [{"errors": 1}]
            with pytest.raises(EstuneError, match="2 calls of rewards failed, more than max_reward_errors, 1"):
                grading.grade(ROWS, COMPLETIONS)


def test_totals_are_added_up_over_a_batch_and_a_step() -> None:
    def paid(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        for text in completions:
            log_metric("tokens", len(text), total=True)
            log_metric("length", len(text))
        return [0.0] * len(completions)

    members = [[*COMPLETIONS[:2], Completion(text, [1], True)] for text in ("four", "five5")]
    task = task_of([paid])
    graded = [grade_completions(task, ROWS, member) for member in members]
    assert [g.metrics()["rewards/paid/tokens"] for g in graded] == [6, 7]
    metrics = step_metrics(graded)
    assert metrics["rewards/paid/tokens"] == 13
    assert metrics["length"] == pytest.approx(13 / 6)

    def taken(log_metric: Any, **_: Any) -> list[float]:
        log_metric("errors", 1, total=True)
        return [0.0] * 3

    with pytest.raises(EstuneError, match="estune's own metrics are called so"):
        grade([taken], [1.0], ROWS, COMPLETIONS)


def test_a_function_is_prepared_before_it_grades() -> None:
    class Unready:
        def prepare(self) -> None:
            raise EstuneError("no disk")

        def __call__(self, **_: Any) -> list[float]:
            return [0.0] * 3

    with pytest.raises(EstuneError, match="no disk"):
        Grading([Unready()])

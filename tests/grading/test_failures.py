"""Reward functions that fail: the error names the row, or the batch is left out and counted."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from estune.errors import EstuneError
from estune.grading.grading import Grading, grade
from estune.run.graded import grade_completions, step_metrics
from tests.grading.functions import COMPLETIONS, ROWS, fails_on_two, right, task_of


@pytest.mark.parametrize("bad", [math.inf, -1e308, 10**400])
def test_scores_that_are_no_numbers_fail_the_member(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    grades = grade([lambda **_: [1.0, bad, 1.0]], [1.0], ROWS, COMPLETIONS)
    assert grades.mean is None
    assert "'x'" in caplog.text


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


def test_an_error_names_the_row() -> None:
    with pytest.raises(
        EstuneError, match=r"raised ZeroDivisionError: division by zero \(\S*functions.py:\d+\) on row 1, 'x'"
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


def test_a_function_is_prepared_before_it_grades() -> None:
    class Unready:
        def prepare(self) -> None:
            raise EstuneError("no disk")

        def __call__(self, **_: Any) -> list[float]:
            return [0.0] * 3

    with pytest.raises(EstuneError, match="no disk"):
        Grading([Unready()])

"""Reward functions under TRL's calling convention."""

from __future__ import annotations

import math
from typing import Any

import pytest

from estune.engines.base import Completion
from estune.errors import EstuneError
from estune.rewards.grade import grade

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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_fail_the_member(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    grades = grade([lambda **_: [1.0, bad, 1.0]], [1.0], ROWS, COMPLETIONS)
    assert grades.mean is None
    assert "'x'" in caplog.text


def test_mistakes_are_one_line() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("numbers")

    with pytest.raises(EstuneError, match="reward broken raised KeyError: 'numbers'"):
        grade([broken], [1.0], ROWS, COMPLETIONS)
    with pytest.raises(EstuneError, match="returned 2 values for 3 completions"):
        grade([lambda **_: [1.0, 2.0]], [1.0], ROWS, COMPLETIONS)

r"""The math reward: what counts as the final answer, and what is equal to the gold answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.grading.isolation import isolation_of
from estune.rewards.answers import MAX_LENGTH, final_answer
from estune.rewards.math import is_right, math_reward
from estune.tasks.base import Task
from estune.tasks.math import gold_answers

pytest.importorskip("math_verify")

CASES = Path(__file__).parents[1] / "data" / "math_cases.jsonl"


def grade(text: Any, *gold: str) -> float | None:
    return math_reward(prompts=["?"], completions=[text], answer=[list(gold)])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5}", "5"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"), (r"\boxed{1} then \fbox{2}", "2"), (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed{5", None), (r"\boxed{1} and \boxed{5", "1"), ("5", None), ("", None), (r"\boxed{}", ""),
        ("The answer is 12.", "12"), ("Answer: 12\nthat is it", "12"), ("#### 12", "12"),
        ("the answer is 3, no, the answer is 4", "4"), ("the answer is: 5", "5"), (r"answer is 3. \boxed{4}", "4"),
        (r"\boxed {5}", "5"), (r"$\boxed 5$.", "5"), (r"\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"\boxed\frac12", r"\frac12"), (r"\boxed\text{no one}.", r"\text{no one}"),
        (r"$\boxed\frac{\sqrt{2}}{2}$", r"\frac{\sqrt{2}}{2}"), (r"\\boxed{5}", "5"),
        (r"\boxed{x}; use \boxed for it", "x"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{1} or $\boxed{2}$", "1, 2"),
        (r"\boxed{5}. Final answer: 7", "7"), (r"\boxed{5}. <answer>7</answer>", "7"),
        (r"\boxed{5}. Final answer: the one above", "5"), (r"\boxed{5}. Now the answer is 12 in base 3", "5"),
        ("<answer>3</answer></answer>", "3"), ("Answer:\n\n18", "18"), ("**Answer:** 18", "18"),
        ("**Final Answer: 18**", "18"), ("The answer is **18**.", "18"), ("The answer is 2**10.", "2**10"),
        ("The final answer is $18$. I hope it is correct.", "18"), ("answer is 3, because 1+2=3.", "3"),
        ("answer is $5 and he saved $3.", "$5 and he saved $3"), ("answer is $x=5$ and $y=6$.", "$x=5$ and $y=6$"),
        ("Answer:\n\\[\n18\n\\]", "18"), ("answer is $50$%.", "50%"), ("answer is 3.5.", "3.5"),
    ],
)  # fmt: skip
def test_the_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("5", "5", 1), ("5.0", "5", 1), ("x=5", "5", 1), ("6", "5", 0), ("", "5", 0),
        (r"\dfrac12", r"\frac{1}{2}", 1), ("0.5", r"\frac{1}{2}", 1), ("1/2", r"\frac{1}{2}", 1), ("0.51", "1/2", 0),
        ("1,234", "1234", 1), ("12,345.5", "12345.5", 1), ("1,2", "12", 0), ("1,2", "1,2", 1), ("2,1", r"\{1,2\}", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1), (r"(1,2)", "(1,2)", 1), ("(2,1)", "(1,2)", 0), ("[1,2]", "(1,2)", 0),
        (r"(x+1)^2", "x^2+2x+1", 1), ("x^2+1", "x^2+2x+1", 0), (r"\text{Evelyn}", r"\text{Evelyn}", 1),
        (r"\text{Carol}", r"\text{Evelyn}", 0), (r"5\text{ cm}", "5", 1), ("$5$", "5", 1),
        (r"\frac{\pi}{2}", r"\pi/2", 1),
        ("21/2", "2 1/2", 0), ("2 1/2", "21/2", 0), ("2½", "2.5", 1), ("١٢", "12", 1), ("√(x+1)", r"\sqrt{x+1}", 1),
        (r"7\cdot10^{37}", "7e37", 1), ("8e37", "7e37", 0), ("-0.000015", "-1.5e-5", 1), ("2e-9", "1e-9", 0),
        ("0", "10^{-10}", 0), ("0.0", "0", 1), (r"2 \cdot 10^{-27}", r"1 \cdot 10^{-27}", 0), ("0.333333", "1/3", 1),
        ("5 million", "5", 0), (r"\$5 million", "5000000", 1), ("6", "6 abc", 0), ("2", "2xy", 0), ("12 eggs", "12", 1),
        ("3 hours and 20 minutes", "3", 0), ("10 choose 2", "10", 0), ("twenty-one", "21", 1), ("3 1/2", "7/2", 1),
        ("neve", r"\text{even}", 0), ("3,4", "(3,4)", 0), ("(B) 12", "B", 1), ("A", "B", 0), ("B and C", "B", 0),
        ("3,5", "3.5", 1), ("1,234", "1.234", 0), ("3.4", "3,4", 0), (r"x > 3 or x \le -2", r"x<-2 \text{ or } x>3", 0),
        (r"[2,\infty)", r"x \geq 2", 1), (r"(2,\infty)", r"x \geq 2", 0), (r"52_{8}", "52_8", 1), ("52", "52_8", 0),
        ("1 or 2", "1", 0), ("1, 2, 3", "2", 0), (r"\text{(B)}", "B", 1), (r"\infty", r"-\infty", 0),
    ],
)  # fmt: skip
def test_what_is_equal(answer: str, gold: str, expected: float) -> None:
    assert grade(f"so $\\boxed{{{answer}}}$.", gold) == expected


def test_answers_that_were_met() -> None:
    """Written by models and by people; where a case is not followed, its `why` says so."""
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    scores = [grade(case["completion"], *gold_answers(case["gold"])) for case in cases]
    assert [c for c, score in zip(cases, scores, strict=True) if (score == c["right"]) == ("why" in c)] == []


def test_any_of_several_gold_answers_is_right() -> None:
    assert grade(r"\boxed{0.02}", "0.01", "0.02") == 1.0
    assert grade(r"\boxed{0.03}", "0.01", "0.02") == 0.0


def test_messages_are_graded_by_the_last_one() -> None:
    assert grade([{"role": "assistant", "content": r"\boxed{3}"}], "3") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 50_000, "{" * 10**6, "answer is " * 10**5, "\\boxed{" + "9" * 10**5 + "}",
        "\\boxed{" + "{" * 10**5 + "}" * 10**5 + "}", "\\boxed{\\frac{\\frac{" * 100,
    ],
)  # fmt: skip
def test_hostile_completions_are_wrong_and_raise_nothing(text: str) -> None:
    assert grade(text, "5") == 0.0


def test_it_runs_in_a_grader_with_a_deadline() -> None:
    found = isolation_of(math_reward)
    assert found is not None
    assert found.deadline is not None
    assert found.max_length >= MAX_LENGTH


def test_no_answer_of_a_problem_without_time_limit_is_cut_off_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    def refuse(*_: Any) -> None:
        raise AssertionError("a signal outside the main thread's hands")

    monkeypatch.setattr(signal, "alarm", refuse)
    monkeypatch.setattr(signal, "setitimer", refuse)
    assert grade(r"\boxed{\sqrt{18}}", r"3\sqrt{2}") == 1.0


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("He has 3*4=12.\n#### 12", ["12"]), ("#### 1,234", ["1234"]), ("-7", ["-7"]), (142.0, ["142"]), (0.5, ["0.5"]),
        (r"Thus $\boxed{\frac{1}{2}}$.", [r"\frac{1}{2}"]), (r"$\boxed {5}$", ["5"]), (r"is $\boxed 5$.", ["5"]),
        (["9.6\n"], ["9.6"]), (["4080\n", "4080"], ["4080"]),
        (["$x$", 3], ["$x$", "3"]), (None, []), ("", []), (True, []), ([], []), ("#### ", []),
    ],
)  # fmt: skip
def test_gold_answers_of_all_known_sets(column: Any, expected: list[str]) -> None:
    assert gold_answers(column) == expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *(("B", said) for said in ("(B) or (C)", "B) and C)", "(B), (D)")),
        *(("7", said) for said in ("7 halves", "7 tenths", "7 dozen", "7 less than x", "7 point five")),
        ("101_2", "101_3"),
        ("101_2", "11_4"),
        ("100200", "100, 200"),
    ],
)
def test_what_is_near_a_gold_answer_is_not_it(gold: str, answer: str) -> None:
    assert not is_right(f"\\boxed{{{answer}}}", gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("B", "(B) because it is even"), ("101_2", "101_{2}"), ("100, 200", "200, 100"), ("1200", "1,200"), ("7", "7 cm")],
)
def test_what_is_written_otherwise_is_the_gold_answer(gold: str, answer: str) -> None:
    assert is_right(f"\\boxed{{{answer}}}", gold)


@pytest.mark.parametrize("gold", [7, 7.0, np.int64(7), np.array([6, 7]), ["x", 7]])
def test_gold_answers_may_be_numbers(gold: Any) -> None:
    assert is_right("\\boxed{7}", gold)
    assert not is_right("\\boxed{8}", gold)


@pytest.mark.parametrize("gold", [None, [], math.nan, True, {"a": 1}, [["7"]]])
def test_what_is_no_answer_is_refused_before_training(gold: Any) -> None:
    with pytest.raises(EstuneError, match=r"^task t: training row 0: answer is .*; give text or a number"):
        Task("t", [{"prompt": "p", "answer": gold}], [], [math_reward], [1.0], None)


def test_a_run_of_spaces_is_one() -> None:
    """Tried in every division, it would take longer than the grader's deadline, and have no score."""
    assert grade("\\boxed{5" + " " * 900 + "x}", "5") == 0.0
    assert grade("\\boxed{5" + "~" * 900 + "cm}", "5") == 1.0

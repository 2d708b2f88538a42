"""What a judge is asked, and how its answer is read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estune.rewards.rubric import plain, preference_of, score_of, to_compare, to_score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 0.7),
        ("Clear and right.\n\nScore: 10", 1.0),
        ("**Score:** 7.5", 0.75),
        ("**Score: 3**", 0.3),
        ("score = 4.", 0.4),
        ("Score: 7/10", 0.7),
        ("Score: 7 out of 10", 0.7),
        ("Score: 7 - good, but long", 0.7),
        ("It wrote `Score: 10`, which is not mine.\nScore: 2", 0.2),
        ('{"reason": "short", "score": 6}', 0.6),
        ('```json\n{"score": "6"}\n```', 0.6),
        ("<think>Score: 9? No.</think>Score: 1", 0.1),
        ("7", 0.7),
        (" **7/10**\n", 0.7),
        ("0", 0.0),
    ],
)
def test_a_score_is_read(answer: str, score: float) -> None:
    assert score_of(answer, 0, 10) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer",
    [
        "", "I would give it 7 of 10.", "Good.", "Score: high", "Score: 11", "Score: -1", "Score: 7/5", "Score: 7-8",
        "Score: 7 or 8", "Score: 7 to 8", "Score: 7,5", "Score: 70%", "Score: 7e3", "Score: 7.5.1", "Score: 1/2", "7 8",
        "Score: 9\nNo, I cannot tell.\nScore: none", "<think>Score: 9", "11", "Score: nan", "Scores: 7", "my_score: 7",
    ],
)  # fmt: skip
def test_what_is_no_score_is_none(answer: str) -> None:
    assert score_of(answer, 0, 10) is None


def test_a_scale_has_two_ends() -> None:
    assert [score_of(f"Score: {n}", 1, 5) for n in (0, 1, 2, 5, 6)] == [None, 0.0, 0.25, 1.0, None]
    assert score_of("Score: -1", -3, 1) == 0.5


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Verdict: A", 1.0), ("A is longer.\n**Verdict:** B", 0.0), ("verdict: tie.", 0.5), ("Verdict: [[A]]", 1.0),
        ("Verdict: A\nRather:\nVerdict: B", 0.0), ("A", None), ("Verdict: A or B", None), ("Verdict: A/B", None),
        ("Verdict: Ambiguous", None), ("Verdict: A. But then:\nVerdict: neither", None), ("", None),
    ],
)  # fmt: skip
def test_a_verdict_is_read(answer: str, worth: float | None) -> None:
    assert preference_of(answer) == worth


@given(st.text(max_size=200), st.text(max_size=200))
def test_nothing_that_is_judged_ends_its_own_tags(prompt: str, completion: str) -> None:
    system, user = to_score("Be kind.", {"prompt": prompt, "completion": completion}, 0, 10)
    tag = user["content"].split(">", 1)[0].rpartition("-")[2]
    assert user["content"] == (
        f"<prompt-{tag}>\n{prompt}\n</prompt-{tag}>\n\n<completion-{tag}>\n{completion}\n</completion-{tag}>"
    )
    assert tag not in prompt + completion
    assert system["content"].startswith("Be kind.")
    assert f"<completion-{tag}>" in system["content"]


def test_the_same_question_is_the_same_text_and_another_has_another_tag() -> None:
    one, again = (to_compare("r", {"A": "x", "B": "y"}) for _ in range(2))
    assert one == again
    assert to_compare("r", {"A": "y", "B": "x"})[0] != one[0]
    braces = to_score("Use {braces} and {0}.", {"completion": "{x}"}, 0, 1)
    assert braces[0]["content"].startswith("Use {braces} and {0}.")


def test_anything_can_be_shown() -> None:
    assert plain("text") == "text"
    assert plain([{"role": "user", "content": "hi"}]) == "hi"
    assert (
        plain([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]) == "user: hi\nassistant: ho"
    )
    assert plain(3) == "3"
    assert json.loads(plain({"a": [1, "é"]})) == {"a": [1, "é"]}

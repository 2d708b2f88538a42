r"""Reward for mathematics: the final answer, compared with the gold answer.

`notation.py` rewrites both as `math-verify` reads them, `forms.py` tells apart what differs in form, and `values.py`
has the library compare what they are worth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from estune.grading.convention import checked, share
from estune.grading.isolation import isolated
from estune.rewards.answers import MAX_LENGTH, final_answer
from estune.rewards.forms import by_clock, choice, differ, in_one_order, is_choice, labelled
from estune.rewards.notation import rewritten, unwrapped
from estune.rewards.text import Text, answer_text, as_text
from estune.rewards.values import library, verified

_NOISE = re.compile(r"(?<!\w)\s+|\s+(?!\w)|\$|\\left|\\right|\\!|\\,|\\;")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z ,-]+")
_DECIMAL = re.compile(r"[-+]?\d+\.\d+")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+)(?:,|\{,\})(\d{1,2}|\d{4,})")
_PLAIN_NUMBER = re.compile(r"[-+]?\d*\.?\d+")
_UNIT_LETTER = re.compile(r"(?<=\d)\s+[mgshLNJWV]$")


# Sympy can compute without end on what a model writes.
@share
@checked(lambda row: gold_texts(row.get("answer", "")))
@isolated(deadline=10.0, errors_as_crashes=True)
def math_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1.0 where the completion's final answer equals the gold answer, else 0.0.

    The final answer is what the last complete `\boxed{...}` holds or, without one, what is stated as the answer
    (`estune.rewards.answers.final_answer`). Answers are equal if their texts are, but for spaces, or if `math-verify`
    proves them equal after both were rewritten by `estune.rewards.notation`.

    Args:
        prompts: not read.
        completions: strings, or lists of messages of which the last is graded.
        answer: for each completion the gold answer in LaTeX or as a number, or a list of several, each of them right.

    Raises:
        EstuneError: `math-verify` is not installed, or an answer is something else.
    """
    return [float(is_right(as_text(text), gold)) for text, gold in zip(completions, answer, strict=True)]


def gold_texts(gold: Any) -> list[str]:
    """A gold answer, or each of several, as text.

    Raises:
        EstuneError: there is none, or one is neither text nor a number.
    """
    golds = gold.tolist() if hasattr(gold, "tolist") else gold
    return [answer_text(each) for each in (golds if isinstance(golds, list | tuple) and golds else [golds])]


def is_right(text: str, gold: Any) -> bool:
    """Whether the final answer of `text` equals a gold answer, one of `gold_texts`."""
    golds = gold_texts(gold)
    found = final_answer(text)
    if found is None or len(found) > MAX_LENGTH:
        return False
    return any(same(right, found) for right in golds)


def plain_answer(text: str) -> str | None:
    """The final answer of a text without spaces and wrapping; None where there is none, or one too long to be read."""
    found = final_answer(text)
    return None if found is None or len(found) > MAX_LENGTH else _plain(found)


def same(gold: str, answer: str) -> bool:
    """Whether two answers, the gold answer first, are equal: as text, by their form, or in value."""
    if _plain(gold) == _plain(answer):
        return True
    right = rewritten(gold)
    if parts := labelled(right):
        return _same_labelled(*parts, answer)
    if letter := choice(right):
        return is_choice(letter, answer)
    if (equal := by_clock(gold, answer)) is not None:
        return equal
    if _DECIMAL.fullmatch(right) and (decimal := _DECIMAL_COMMA.fullmatch(answer.strip(" $"))):
        answer = f"{decimal[1]}.{decimal[2]}"
    given = rewritten(answer)
    if _PLAIN_NUMBER.fullmatch(right):
        given = _UNIT_LETTER.sub("", given)
    right, given = in_one_order(right, given)
    if _plain(right) == _plain(given):
        return True
    return not differ(right, given, unwrapped(gold) != gold) and verified(right, given)


def _same_labelled(letter: str, value: str, answer: str) -> bool:
    """Whether an answer is a choice's letter, or what it stands for, or both."""
    given = labelled(rewritten(answer))
    if given:
        return given[0] == letter and same(value, given[1])
    return is_choice(letter, answer) or same(value, answer)


def _plain(text: str) -> str:
    r"""As text: without spaces, but for those between letters or digits, which tell `2 1/2` from `21/2`."""
    text = unwrapped(text.strip())
    text = _NOISE.sub("", text.replace("dfrac", "frac").replace("tfrac", "frac")).removesuffix(".")
    return text.lower() if _LETTERS.fullmatch(text) else text


setattr(math_reward, "prepare", library)  # noqa: B010 - a function has no such attribute to the type checker

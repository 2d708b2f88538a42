"""Rewards for short answers: the paper's (arXiv 2509.24372, conciseness), and whether the answer is given at all."""

import re
from collections.abc import Sequence
from typing import Any

from estune.grading.convention import checked, share
from estune.rewards.text import Text, answer_text, as_text

_WORD = re.compile(r"\w+")


@checked(lambda row: answer_text(row.get("answer", "")))
def length_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """The paper's reward: minus the difference, in characters, between the completion's length and the reference's.

    Args:
        prompts: not read. (The authors' code counts the prompt as part of the completion; here it is not.)
        completions: strings, or lists of messages of which the last is graded.
        answer: for each completion, the reference answer, text or a number.
    """
    rows = zip(completions, answer, strict=True)
    return [-float(abs(len(as_text(text)) - len(answer_text(right)))) for text, right in rows]


@share
@checked(lambda row: answer_text(row.get("answer", "")))
def correct_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where the reference answer's words stand in the completion, in this order and next to each other.

    Case and punctuation do not matter. `paris` is in "It is Paris.", and not in "comparison".
    """
    rows = zip(completions, answer, strict=True)
    return [float(contains(as_text(text), answer_text(right))) for text, right in rows]


def contains(text: str, answer: str) -> bool:
    """Whether the words of `answer` are among those of `text`, side by side. An answer without words is in no text."""
    words = " ".join(_WORD.findall(answer.lower()))
    return bool(words) and f" {words} " in f" {' '.join(_WORD.findall(text.lower()))} "

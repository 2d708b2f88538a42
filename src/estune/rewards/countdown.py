"""Countdown's two rewards (arXiv 2509.24372), as reward functions of TRL's signature.

The paper's reward is `answer_reward + 0.1 * format_reward`. Differences from the authors' code: only the completion is
graded, so the example in the prompt earns nothing; arithmetic is exact; targets may be decimals.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import Any

from estune.errors import EstuneError
from estune.grading.convention import Row, checked, share
from estune.rewards.expression import ExpressionError, Value, evaluate, tokenize
from estune.rewards.text import Text, as_text, last_answer

_THINK = "<think>"
_END_THINK = "</think>"
_ANSWER = "<answer>"
_END_ANSWER = "</answer>"
_TARGET = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?(e[-+]?[0-9]{1,2})?", re.IGNORECASE)

# With so many decimals a target may be a longer number cut short: 266.666 stands for 800/3.
_ROUNDED_DECIMALS = 3
# And 23.666666666666668 is the float nearest to 71/3, and further from it than one unit of its last place.
_RELATIVE = Fraction(1, 10**9)


def parse_numbers(numbers: Any) -> list[int]:
    """The numbers to use, as integers.

    Raises:
        EstuneError: they are no list of whole numbers, or an empty one. Texts are refused: they would equal no number.
    """
    given = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if isinstance(given, list | tuple) and given and all(map(_is_natural, given)):
        return [int(number) for number in given]
    raise EstuneError(f"countdown: the numbers are {numbers!r:.80}; give a list of whole numbers")


def _is_natural(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer() and float(value) >= 0


def _check(row: Row) -> None:
    """Check the values of a row's columns. If a column is missing, calling the reward says so."""
    parse_numbers(row.get("numbers", [0]))
    parse_target(row.get("target", 0))


@share
@checked(_check)
def answer_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], numbers: Sequence[Any], target: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where the last `<answer>` is an expression of the given numbers, each used once, that reaches the target.

    Args:
        prompts: not read.
        completions: strings, or lists of messages of which the last is graded.
        numbers: for each completion, the integers to use, in a list.
        target: for each completion, what to reach: an integer, a decimal, or either as a string. An integer or a
            decimal of up to two places must be reached exactly, a longer one to within one unit of its last place or
            1e-9 of itself, whichever is more.

    Returns:
        One of 0.0 and 1.0 for each completion. No text raises, and the work is linear in its length.

    Raises:
        EstuneError: numbers that are no list of whole numbers, or a target that is no number.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [float(_solves(as_text(completion), given, goal)) for completion, given, goal in rows]


@share
def format_reward(*, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float | None]:
    r"""1.0 where the whole is `<think>...</think>\n<answer>...</answer>`.

    Otherwise 0.1 for a think pair, and 0.5 more for an answer pair. A `<think>` at the end of the prompt belongs to the
    completion.
    """
    return [_format(as_text(prompt), as_text(text)) for prompt, text in zip(prompts, completions, strict=True)]


def plain_answer(text: str) -> str | None:
    """The expression in the last `<answer>`, without spaces; None where there is none."""
    found = last_answer(text)
    return None if found is None else "".join(found.split())


def parse_target(target: Any) -> tuple[Fraction, Fraction]:
    """A target as a rational, and the distance below which a value reaches it (0: it must be equal).

    Raises:
        EstuneError: not an integer or a decimal of at most 20 digits before and after its point, with or without an
            exponent of two.
    """
    return _parse_target(str(target).strip())


@lru_cache(maxsize=65536)
def _parse_target(text: str) -> tuple[Fraction, Fraction]:
    match = _TARGET.fullmatch(text)
    if not match:
        raise EstuneError(f"countdown: the target {text[:40]!r} is no number; give an integer or a decimal like 27.4")
    goal = Fraction(text)
    decimals = len(match[1] or ".") - 1 - int((match[2] or "e0")[1:])
    if decimals < _ROUNDED_DECIMALS:
        return goal, Fraction(0)
    return goal, max(Fraction(1, 10**decimals), _RELATIVE * abs(goal))


def _solves(text: str, given: Any, target: Any) -> bool:
    numbers = parse_numbers(given)
    goal, tolerance = parse_target(target)
    answer = last_answer(text)
    if answer is None:
        return False
    try:
        tokens = tokenize(answer.strip())
        # The cheap test comes first: most wrong answers use other numbers.
        if sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers):
            return False
        return _reaches(evaluate(tokens), goal, tolerance)
    except ExpressionError:
        return False


def _reaches(value: Value, goal: Fraction, tolerance: Fraction) -> bool:
    return value == goal or abs(value - goal) < tolerance


def _format(prompt: str, completion: str) -> float:
    text = _THINK + completion if prompt.endswith(_THINK) else completion
    if _is_whole(text):
        return 1.0
    return 0.1 * _has_pair(text, _THINK, _END_THINK) + 0.5 * _has_pair(text, _ANSWER, _END_ANSWER)


def _is_whole(text: str) -> bool:
    """Whether `^<think>.*?</think>\n<answer>.*?</answer>$` matches, dots matching anything, in one scan."""
    text = text.removesuffix("\n")
    middle = f"{_END_THINK}\n{_ANSWER}"
    start = text.find(middle, len(_THINK))
    return text.startswith(_THINK) and start >= 0 and text.endswith(_END_ANSWER, start + len(middle))


def _has_pair(text: str, opening: str, closing: str) -> bool:
    start = text.find(opening)
    return start >= 0 and text.find(closing, start + len(opening)) >= 0

r"""Reward for mathematics: the final answer, compared with the gold answer by `math-verify`.

Before it comes `notation.py`, which rewrites what it misreads; and after it what it finds equal and is not: values so
small that their first six decimals are 0, numbers of another base, and lists where a point is asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from estune.errors import EstuneError
from estune.grading.convention import checked, share
from estune.grading.isolation import isolated
from estune.rewards.answers import MAX_LENGTH, final_answer
from estune.rewards.notation import rewritten, unwrapped
from estune.rewards.text import Text, answer_text, as_text

_NOISE = re.compile(r"(?<!\w)\s+|\s+(?!\w)|\$|\\left|\\right|\\!|\\,|\\;")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z ,-]+")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(r"(?:\\(?:text|math)\w*\s*\{)?\s*(?:\(([A-Ja-j])\)|([A-Ja-j])(?:[).:]|\s*\}|$))(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"[\s.)}]*(?:[,;/&]|and\b|or\b)\s*(?:\([A-Ja-j]\)|[A-J]\b)")
_BASE = re.compile(r"\w+_\{?\d+\}?")
_POINT = re.compile(r"(?:\\left)?[(\[].*,.*[)\]]", re.DOTALL)
_BARE_LIST = re.compile(r"[^()\[\]{}=]*,[^()\[\]{}=]*")
_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_DECIMAL = re.compile(r"[-+]?\d+\.\d+")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+)(?:,|\{,\})(\d{1,2}|\d{4,})")
_CLOSE = 1e-4  # how far from each other, relative to the larger, values may be that math-verify finds equal
_SAME = 1e-12  # how near to each other they must be where it does not


# Sympy can compute without end on what a model writes.
@share
@checked(lambda row: gold_texts(row.get("answer", "")))
@isolated(deadline=10.0, errors_as_crashes=True)
def math_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1.0 where the completion's final answer equals the gold answer, else 0.0.

    The final answer is what the last complete `\boxed{...}` holds or, without one, what is stated as the answer
    (`estune.rewards.answers.final_answer`). Equal are the same text but for spaces, and what `math-verify` proves equal
    when both are rewritten by `estune.rewards.notation`.

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


def same(gold: str, answer: str) -> bool:
    """Whether two answers are equal, as text or to `math-verify`, which is told first which one is gold."""
    if _plain(gold) == _plain(answer):
        return True
    right = rewritten(gold)
    choice = _CHOICE.fullmatch(right)
    if choice:
        chosen = _CHOSEN.fullmatch(answer.strip())
        if chosen is None or _OTHER_CHOICE.match(chosen[3]):  # "(B) or (C)" chooses nothing
            return False
        return bool((chosen[1] or chosen[2]).upper() == choice[1])
    if _DECIMAL.fullmatch(right) and (decimal := _DECIMAL_COMMA.fullmatch(answer.strip(" $"))):
        answer = f"{decimal[1]}.{decimal[2]}"
    given = rewritten(answer)
    if _plain(right) == _plain(given):
        return True
    is_text = gold.lstrip().startswith("\\text")
    return not _differ(right, given, is_text) and _verified(_parsed(right), _parsed(given))


def _base(number: str) -> str:
    """What stands below a number, without braces; the empty text where nothing does."""
    return number.partition("_")[2].strip("{} ")


def _differ(gold: str, answer: str, is_text: bool) -> bool:
    """Whether two answers that are not the same text are known to differ, whatever `math-verify` finds.

    - Words, whose letters it takes for factors, in any order; and whole numbers.
    - A number of another base than ten, without its base or with another one.
    - A list where a point or an interval is asked for.
    """
    return (
        (is_text and _LETTERS.fullmatch(gold) is not None)
        or (
            _INTEGER.fullmatch(gold) is not None and _INTEGER.fullmatch(answer) is not None and int(gold) != int(answer)
        )
        or (_BASE.fullmatch(gold) is not None and _base(gold) != _base(answer))
        or (_POINT.fullmatch(gold) is not None and _BARE_LIST.fullmatch(answer) is not None)
    )


def _verified(gold: Any, answer: Any) -> bool:
    _, verify = _math_verify()
    # Its timeouts are signals, which only a main thread can have: the deadline is the grader's.
    equal = bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))
    if not equal and not any(parsed and getattr(parsed[0], "is_Float", False) for parsed in (gold, answer)):
        return False
    difference = _difference(gold, answer)
    return equal if difference is None else difference < (_CLOSE if equal else _SAME)


def _difference(gold: Any, answer: Any) -> float | None:
    """How far two numbers are from each other, relative to the larger; None unless both are numbers."""
    from sympy import UnevaluatedExpr

    values = [parsed[0] for parsed in (gold, answer) if parsed and getattr(parsed[0], "is_number", False)]
    # A percentage, which equals two numbers: 50% is 0.5 and 50.
    if len(values) < 2 or any(value.has(UnevaluatedExpr) for value in values):
        return None
    one, other = (value.evalf(20) for value in values)
    larger = max(abs(one), abs(other))
    return float(abs(one - other) / larger) if larger.is_finite and larger > 0 else None


def _plain(text: str) -> str:
    r"""As text: without spaces, but for those between letters or digits, which tell `2 1/2` from `21/2`."""
    text = unwrapped(text.strip())
    text = _NOISE.sub("", text.replace("dfrac", "frac").replace("tfrac", "frac")).removesuffix(".")
    return text.lower() if _LETTERS.fullmatch(text) else text


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    parse, _ = _math_verify()
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


@cache
def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise EstuneError("math needs the package math-verify: pip install 'estune[math]'") from error
    for part in ("parser", "grader"):  # they warn that no timeout is set, which is so on purpose
        logging.getLogger(f"math_verify.{part}").setLevel(logging.ERROR)
    return parse, verify


setattr(math_reward, "prepare", _math_verify)  # noqa: B010 - a function has no such attribute to the type checker

r"""Reward for mathematics: the last `\boxed` answer, compared with the gold answer by `math-verify`."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from estune.errors import EstuneError
from estune.grading.isolation import isolated
from estune.rewards.text import Text, as_text

MAX_LENGTH = 1000
"""Longest answer read, in characters; a longer one is wrong. Gold answers have at most a few hundred."""

_BOXES = ("\\boxed{", "\\fbox{")
_STATED = re.compile(r"(?:answer is|answer:|####)[: \t]*((?:(?!answer is|answer:|####)[^\n])+)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!|,\\!)(?=\d{3}(?!\d))")
_PLAIN_GROUPS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}|\\,|,\\!)\d{3})+(?:\.\d+)?")
_NOISE = re.compile(r"\s+|\$|\\left|\\right|\\!|\\,|\\;")


# Sympy can compute without end on what a model writes.
@isolated(deadline=10.0, errors_as_crashes=True)
def math_reward(
    *, prompts: Sequence[Text], completions: Sequence[Text], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1.0 where the completion's final answer equals the gold answer, else 0.0.

    The final answer is what the last `\boxed{...}` holds; where there is none, what the last `answer is`, `answer:` or
    `####` is followed by on its line. Equal are the same text but for spaces, and what `math-verify` proves equal.

    Args:
        prompts: not read.
        completions: strings, or lists of messages of which the last is graded.
        answer: for each completion the gold answer in LaTeX, or a list of several, each of them right.

    Raises:
        EstuneError: `math-verify` is not installed.
    """
    return [float(is_right(as_text(text), gold)) for text, gold in zip(completions, answer, strict=True)]


def is_right(text: str, gold: str | Sequence[str]) -> bool:
    """Whether the final answer of `text` equals a gold answer."""
    found = final_answer(text)
    if found is None or len(found) > MAX_LENGTH:
        return False
    return any(same(right, found) for right in ([gold] if isinstance(gold, str) else gold))


def final_answer(text: str) -> str | None:
    """What the last complete box holds, else what is stated as the answer; None without either."""
    starts = sorted((text.rfind(box), len(box)) for box in _BOXES)
    start, width = starts[-1]
    if start >= 0:
        return _to_closing_brace(text[start + width :])
    stated = _STATED.findall(text[-10 * MAX_LENGTH :])
    return str(stated[-1]).strip().removesuffix(".") if stated else None


def same(gold: str, answer: str) -> bool:
    """Whether two answers are equal, as text or to `math-verify`, which is told first which one is gold."""
    if _plain(gold) == _plain(answer):
        return True
    _, verify = _math_verify()
    # Its timeouts are signals, which only a main thread can have: the deadline is the grader's.
    return bool(verify(_parsed(_grouped(gold)), _parsed(_grouped(answer)), timeout_seconds=None))


def _to_closing_brace(text: str) -> str | None:
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[: 2 * MAX_LENGTH], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[: match.start()].strip()
    return None


def _plain(text: str) -> str:
    return _NOISE.sub("", text.replace("dfrac", "frac").replace("tfrac", "frac")).removesuffix(".")


def _grouped(text: str) -> str:
    """A number written in groups of three, as one; anything else could be a list."""
    stripped = text.strip().strip("$")
    return _THOUSANDS.sub("", stripped) if _PLAIN_GROUPS.fullmatch(stripped) else stripped


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

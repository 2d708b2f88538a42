"""Texts as rewards read them: strings or chat messages, the answer in its tags, and values that a text spells."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from estune.completion import content_text
from estune.errors import EstuneError

Messages = Sequence[Mapping[str, Any]]
Text = str | Messages

_ANSWER = "<answer>"
_END_ANSWER = "</answer>"
_THINK = "<think>"
_END_THINK = "</think>"


def as_text(text: Text) -> str:
    """The string itself, or the content of the last message; empty if there is no message."""
    if isinstance(text, str):
        return text
    return content_text(text[-1].get("content")) if text else ""


def answer_text(answer: Any) -> str:
    """A gold answer as text; a number as it is written, a whole one without a point.

    Raises:
        EstuneError: it is neither.
    """
    found = answer.tolist() if hasattr(answer, "tolist") else answer  # numpy's numbers
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, str | int | float) or str(found) == "nan":
        raise EstuneError(f"answer is {answer!r:.80}; give text or a number")
    return str(found)


def last_answer(text: str) -> str | None:
    """The text between the last `<answer>` that is closed and the first `</answer>` after it; None without such a pair.

    Further `</answer>`, as in prose later on, are ignored.
    """
    start = text.rfind(_ANSWER, 0, max(text.rfind(_END_ANSWER), 0))
    return None if start < 0 else text[start + len(_ANSWER) : text.find(_END_ANSWER, start)]


def without_thoughts(text: str) -> str:
    """A text without its `<think>...</think>`. The prompt may have opened the first, and the last may have no end."""
    *thoughts, rest = text.split(_END_THINK)
    shown = [part.partition(_THINK)[0] if number or _THINK in part else "" for number, part in enumerate(thoughts)]
    return "".join(shown) + ("" if rest.lstrip().startswith(_THINK) else rest)


def spelled(value: Any) -> Any:
    """The number, list or switch that a text spells as JSON, as from a command line; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def listed(value: Any) -> Any:
    """The items of a text with commas between, in brackets or not, as from a command line; anything else as it is."""
    return [item.strip() for item in value.strip("[]").split(",") if item.strip()] if isinstance(value, str) else value

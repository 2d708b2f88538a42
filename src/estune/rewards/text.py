"""What a reward function is given, as plain text: a string, or a list of chat messages; and the answer in its tags."""

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
    """The string itself, or the content of the last message; the empty string where there is none."""
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
    """What stands between the last `<answer>` that is closed and the first `</answer>` after it; None without a pair.

    A `</answer>` too many, or one in prose further on, belongs to nothing.
    """
    start = text.rfind(_ANSWER, 0, max(text.rfind(_END_ANSWER), 0))
    return None if start < 0 else text[start + len(_ANSWER) : text.find(_END_ANSWER, start)]


def without_thoughts(text: str) -> str:
    """A text without what stands in `<think>...</think>`; the prompt may have opened the first, and none may end."""
    *thoughts, rest = text.split(_END_THINK)
    shown = [part.partition(_THINK)[0] if number or _THINK in part else "" for number, part in enumerate(thoughts)]
    return "".join(shown) + ("" if rest.lstrip().startswith(_THINK) else rest)

"""What a reward function is given, as plain text: a string, or a list of chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from estune.completion import content_text

Messages = Sequence[Mapping[str, Any]]
Text = str | Messages


def as_text(text: Text) -> str:
    """The string itself, or the content of the last message; the empty string where there is none."""
    if isinstance(text, str):
        return text
    return content_text(text[-1].get("content")) if text else ""

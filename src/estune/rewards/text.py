"""What a reward function is given, as plain text: a string, or a list of chat messages."""

from collections.abc import Mapping, Sequence

Messages = Sequence[Mapping[str, str]]
Text = str | Messages


def as_text(text: Text) -> str:
    """The string itself, or the content of the last message; the empty string where there is none."""
    if isinstance(text, str):
        return text
    return text[-1].get("content") or "" if text else ""

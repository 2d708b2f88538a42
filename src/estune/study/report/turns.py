"""The turns of a rollout, from the transcript that a run keeps of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from estune.study.report.tables import Row

Turn = tuple[str, str]
"""A speaker, and what is said."""


def turns_of(row: Row) -> list[Turn]:
    """The turns after the prompt, if there are several answers; empty if it was not played, or cannot be read.

    Args:
        row: of a table of completions.
    """
    try:
        messages = json.loads(row.get("transcript") or "[]")
        turns = [(str(message.get("role", "")), _text(message)) for message in messages]
    except (ValueError, TypeError, AttributeError):
        return []
    first = next((i for i, (role, _) in enumerate(turns) if role == "assistant"), 0)
    if "".join(text for _, text in turns[:first]).strip() in str(row["prompt"]):
        turns = turns[first:]  # what stands before is the prompt, which is shown anyway
    return turns if len(turns) > 1 else []


def _text(message: Mapping[str, Any]) -> str:
    """What a message says, its parts and its calls of tools in their order."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", "")
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(f"{function.get('name', '')}({written})")
    return "\n".join(part for part in parts if part)

"""What clients are sent: OpenAI's objects, whole or in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from estune.completion import Completion, Message


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    """How many tokens were read and written."""
    written = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def ending(completion: Completion, answer: Message) -> str:
    """Why a completion ended, as OpenAI calls it."""
    if not completion.finished:
        return "length"
    return "tool_calls" if answer.get("tool_calls") else "stop"


@dataclass
class Writer:
    """Writes the answer to one request.

    Attributes:
        model: its name.
        chat: messages rather than texts.
    """

    model: str
    chat: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[tuple[Message, Completion]], used: dict[str, int]) -> dict[str, Any]:
        """The answer as a whole."""
        choices = [
            {**self._said(answer), "index": index, "logprobs": None, "finish_reason": ending(completion, answer)}
            for index, (answer, completion) in enumerate(answers)
        ]
        return {**self._head(), "choices": choices, "usage": used}

    def begun(self, index: int) -> bytes:
        """The piece with which a message begins."""
        return self._piece(index, {"role": "assistant", "content": ""}, "")

    def grown(self, index: int, text: str) -> bytes:
        """A piece of text."""
        return self._piece(index, {"content": text}, text)

    def called(self, index: int, calls: Sequence[dict[str, Any]]) -> bytes:
        """The piece with the tool calls."""
        return self._piece(index, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}, "")

    def ended(self, index: int, reason: str) -> bytes:
        """The piece that says why it has ended."""
        return self._piece(index, {}, "", reason)

    def used(self, used: dict[str, int]) -> bytes:
        """The piece with what was used."""
        return event({**self._head(piece=True), "choices": [], "usage": used})

    def _piece(self, index: int, delta: dict[str, Any], text: str, reason: str | None = None) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return event({**self._head(piece=True), "choices": [choice]})

    def _said(self, answer: Message) -> dict[str, Any]:
        return {"message": {**answer, "refusal": None}} if self.chat else {"text": answer["content"]}

    def _head(self, *, piece: bool = False) -> dict[str, Any]:
        kind = "chat.completion" + (".chunk" if piece else "") if self.chat else "text_completion"
        return {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"

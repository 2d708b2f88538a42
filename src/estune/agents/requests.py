"""What clients ask: the bodies of OpenAI's requests, read, and refused as OpenAI refuses them.

What would change the answer and cannot be kept is refused; fields that change nothing here are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from estune.completion import Message, Sampling

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_STOPS = 4
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logprobs", "top_logprobs", "echo"), (None, False)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (None, 0, 0.0)),
    **dict.fromkeys(("logit_bias", "functions", "audio", "suffix", "guided_json", "prediction"), (None, {}, [], "")),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "repetition_penalty": (None, 1, 1.0),
    "response_format": (None, {"type": "text"}),
}
"""Fields that cannot be obeyed, with the values that ask for nothing."""

Texts = Annotated[list[str], Field(min_length=1, max_length=1024)]
Ids = Annotated[list[int], Field(min_length=1)]


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what, where, what to do.
        code: OpenAI's word for the reason, if it has one.
        param: the field of the request that it is about.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The refusal as OpenAI writes it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool | None = False


class Body(BaseModel):
    """What both kinds of request have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that a completion may have, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a completion ends."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what has been used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are drawn: as the request says and, where it says nothing, as the default does."""
        given: dict[str, Any] = {
            "max_new_tokens": self.most_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
        }
        return replace(default, **{key: value for key, value in given.items() if value is not None})


class ChatBody(Body):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> str | None:
        """The function that has to be called; "" if any function has to be, None if none has to be.

        Raises:
            Refusal: the function is none of the tools.
        """
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return None
        names = [tool["function"]["name"] for tool in self.tools or []]
        if choice == "required" and names:
            return ""
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise Refusal(
                400,
                f"tool_choice: {choice!r:.80} asks for none of the tools {names}; give auto, none, required or one "
                "of them",
                param="tool_choice",
            )
        return str(name)


class TextBody(Body):
    """A request to /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=1024)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


Kind = TypeVar("Kind", bound=Body)


def read_body(kind: type[Kind], raw: bytes) -> Kind:
    """A request's body.

    Raises:
        Refusal: it is malformed; the message names the field.
    """
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise Refusal(400, "the body is no JSON object")
    for name, nothing in _NOTHING.items():
        if name in given and repr(given[name]) not in map(repr, nothing):
            raise Refusal(
                400, f"{name}: {given[name]!r:.80} cannot be kept here; leave it out", "unsupported_parameter", name
            )
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(map(str, first["loc"]))
        raise Refusal(400, f"{where}: {first['msg']}, found {first['input']!r:.80}", param=param) from None
    if isinstance(body, ChatBody):
        _check_tools(body)
        for place, message in enumerate(body.messages):
            _check_message(f"messages.{place}", message)
    return body


def shown_message(message: Message) -> Message:
    """A message as chat templates know it: system for developer, and the arguments of tool calls as objects."""
    shown = dict(message)
    if message["role"] == "developer":
        shown["role"] = "system"
    if calls := message.get("tool_calls"):
        shown["tool_calls"] = [_shown_call(call) for call in calls]
    return shown


def _shown_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _check_tools(body: ChatBody) -> None:
    for place, tool in enumerate(body.tools or []):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not _is_name(function.get("name")):
            raise Refusal(400, f"tools.{place}: {tool!r:.80} is no function with a name", param="tools")


def _check_message(where: str, message: Message) -> None:
    role = message.get("role")
    content = message.get("content")
    calls = message.get("tool_calls") or []
    if role not in ROLES:
        raise Refusal(400, f"{where}.role: found {role!r:.80}; give one of {', '.join(ROLES)}", param="messages")
    parts = content if isinstance(content, list) else []
    if not (content is None or isinstance(content, str | list)) or not all(isinstance(part, dict) for part in parts):
        raise Refusal(400, f"{where}.content: {content!r:.80} is neither text nor a list of parts", param="messages")
    if content is None and not calls and role != "assistant":
        raise Refusal(400, f"{where}.content: there is none; give text", param="messages")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(
                400,
                f"{where}.content: a part of type {part.get('type')!r:.40}, and this model is given text alone; leave "
                "it out",
                param="messages",
            )
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise Refusal(400, f"{where}.tool_calls: {calls!r:.80} are no calls of functions", param="messages")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        return False
    return function.get("arguments") is None or isinstance(function["arguments"], str)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name)

"""How models write tool calls, and the calls in what they have written.

How a model writes them is told by what its chat template itself writes. The parser is transformers'. A style is its
response template, https://huggingface.co/docs/transformers/chat_response_parsing, and the beginning of a call: where a
call is required the answer is begun with it, and the model goes on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from estune.errors import EstuneError

CALL_ID = 9  # characters; Mistral's templates refuse any other number

_FUNCTION = {"type": "function", "function": "{content}"}


@dataclass(frozen=True)
class Style:
    """A way to write tool calls.

    Attributes:
        marks: what a chat template of this style has in it.
        calls: the field of a response template that reads calls.
        begin: how a call begins.
        named: how it goes on from the function's name to its arguments.
    """

    marks: tuple[str, ...]
    calls: dict[str, Any]
    begin: str
    named: str


STYLES = (
    Style(  # Qwen3-Coder, Qwen3.5
        ("<tool_call>", "<function=", "<parameter="),
        {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
            "close_pattern": r"</tool_call>\s*",
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "<tool_call>\n<function=",
        ">\n",
    ),
    Style(  # Hermes, Qwen2.5, Qwen3, SmolLM2 and 3
        ("<tool_call>",),
        {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "content": "json", "transform": _FUNCTION},
        '<tool_call>\n{"name": "',
        '", "arguments": ',
    ),
    Style(  # Mistral, before it wrote [ARGS]
        ("[TOOL_CALLS]",),
        {"open": "[TOOL_CALLS]", "content": "json", "transform": _FUNCTION},
        '[TOOL_CALLS][{"name": "',
        '", "arguments": ',
    ),
    Style(  # Phi-4-mini, Granite 3
        ("<|tool_call|>",),
        {
            "open": "<|tool_call|>",
            "close_pattern": r"<\|/tool_call\|>\s*",
            "content": "json",
            "transform": _FUNCTION,
        },
        '<|tool_call|>[{"name": "',
        '", "arguments": ',
    ),
    Style(  # Llama 3
        ("<|start_header_id|>", "parameters"),
        {
            "open_pattern": r"\A\s*(?:<\|python_tag\|>)?(?=\s*[{\[])",
            "content": "json",
            "transform": _FUNCTION,
        },
        '{"name": "',
        '", "parameters": ',
    ),
    Style(  # others that write JSON and nothing else
        ('"name"', '"arguments"'),
        {"open_pattern": r"\A\s*(?=[{\[])", "content": "json", "transform": _FUNCTION},
        '{"name": "',
        '", "arguments": ',
    ),
)
"""Those that are known, the more particular first."""


def find_style(name: str, chat_template: str | None) -> Style:
    """The way in which a model writes tool calls.

    Args:
        name: what the user calls the model.
        chat_template: the text of its chat template.

    Raises:
        EstuneError: its template takes no tools, or writes calls in a way that is not known, or transformers is too
            old to read them.
    """
    _parser()
    if chat_template is None or not re.search(r"\btools\b", chat_template):
        raise EstuneError(
            f"tools: the chat template of {name!r} takes none; leave them out, or tell of them in a message"
        )
    if "[ARGS]" not in chat_template:
        for style in STYLES:
            if all(mark in chat_template for mark in style.marks):
                return style
    raise EstuneError(
        f"tools: the chat template of {name!r} writes calls in a way that is not known here; leave tools out, or tell "
        "of them in a message"
    )


def beginning(style: Style, forced: str | None) -> str:
    """The beginning of an answer that has to call the function `forced`, or any if that is ""; empty if it is None."""
    if forced is None:
        return ""
    return style.begin + (forced + style.named if forced else "")


def parse_calls(
    text: str, style: Style, tools: Sequence[dict[str, Any]], seed: int
) -> tuple[str, list[dict[str, Any]]]:
    """The content and the tool calls of an answer, as OpenAI writes them.

    What a model thinks stays in the content, and calls no function. An answer whose calls cannot be read is content.

    Args:
        text: the answer with its special tokens, but for the one that ended it.
        style: how the model writes calls.
        tools: the functions; arguments get the types of their parameters.
        seed: of the calls' ids.
    """
    thoughts, thought, rest = text.rpartition("</think>")
    if not thought and "<think>" in text:
        return text, []
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "\0",  # there is no prefix to find it in
        "fields": {"tool_calls": {**style.calls, "repeats": True}, "content": {"content_args": {"strip": False}}},
    }
    try:
        found = _parser()(rest, template, prefix="", tools=list(tools))
    except (ValueError, RecursionError):
        return text, []
    calls = [call for each in found.get("tool_calls", ()) for call in _each(each["function"])]
    if not calls or not all(map(_is_call, calls)):
        return text, []
    content = (thoughts + thought + found.get("content", "")).strip()
    return content, [_call(call, seed, place) for place, call in enumerate(calls)]


def _parser() -> Callable[..., dict[str, Any]]:
    """transformers' parser of answers, as of 5.15."""
    try:
        from transformers.utils.chat_parsing import parse_response
    except ImportError:
        parse_response = None
    if parse_response is None or "tools" not in inspect.signature(parse_response).parameters:
        raise EstuneError("tools: calls are read with transformers 5.15 or later; update it, or leave tools out")
    found: Callable[..., dict[str, Any]] = parse_response
    return found


def _each(function: Any) -> list[Any]:
    return function if isinstance(function, list) else [function]


def _arguments(function: dict[str, Any]) -> Any:
    return function.get("arguments", function.get("parameters"))


def _is_call(function: Any) -> bool:
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(_arguments(function), dict | str)
    )


def _call(function: dict[str, Any], seed: int, place: int) -> dict[str, Any]:
    arguments = _arguments(function)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = hashlib.blake2b(f"{seed} {place}".encode()).hexdigest()[:CALL_ID]
    return {"id": name, "type": "function", "function": {"name": function["name"], "arguments": text}}

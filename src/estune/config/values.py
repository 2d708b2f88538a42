"""What every section of settings builds on: how values are read that a command line or TRL's users write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from estune.es.rate import Rate
from estune.tasks.options import refuse_switch

_NOT_FOR_TEMPLATES = frozenset(
    ("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message")
) | {"return_assistant_tokens_mask", "tokenize"}


class Section(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_switch(cls, info.field_name or "", value)
        return value


def names(value: Any) -> Any:
    """A list as TRL's users write it too: `tensorboard`, `none`, or names with commas between."""
    if isinstance(value, str):
        listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        value = [name.strip() for name in listed.split(",") if name.strip()]
    return [] if value == ["none"] else value


def server_url(text: str) -> str:
    """A server's address, without the path under which OpenAI's clients look for it.

    Raises:
        ValueError: it is none, or has a password in it.
    """
    url = text.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        fine = parts.hostname and parts.port != 0  # asked for, they are looked at
    except ValueError:
        fine = False
    if not fine or not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", url):
        raise ValueError(f"{text!r} is no address of a server: write http://HOST:PORT, and its key in VLLM_API_KEY")
    return url


def urls(value: Any) -> list[str]:
    """Addresses of servers.

    Raises:
        ValueError: one is none.
    """
    found = [server_url(str(url)) for url in names(value) or []]
    if twice := next((url for url in found if found.count(url) > 1), None):
        raise ValueError(f"{twice} stands there twice: each server is one worker")
    return found


def template_options(value: Any) -> Any:
    """What a chat template takes, as `_json` reads it.

    Raises:
        ValueError: no mapping, or a name that is not the user's to give.
    """
    found = _json(value, '{"enable_thinking": false}')
    if own := sorted(_NOT_FOR_TEMPLATES.intersection(found)):
        raise ValueError(f"{', '.join(own)} cannot be given here: it is what estune itself tells the template")
    return found


def scales(value: Any) -> Any:
    """Factors of sigma by pattern, as `_json` reads them: numbers above 0, which float32 holds, or rms.

    Raises:
        ValueError: another factor, or no mapping.
    """
    found = _json(value, '{"*.mlp.*": 0.5}')
    for pattern, factor in found.items():
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if factor != "rms" and not (number and 1e-30 <= factor <= 1e30):
            raise ValueError(f"write a number above 0, from 1e-30 to 1e30, for {pattern}, or rms")
    return found


def _json(value: Any, example: str) -> Any:
    """A mapping whose texts are read as JSON where that gives something else, as from a command line; or all as JSON.

    Raises:
        ValueError: no mapping.
    """
    value = _number_or_switch(value) if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"write a mapping, such as {example}")
    found = {key: _number_or_switch(item) if isinstance(item, str) else item for key, item in value.items()}
    json.dumps(found, allow_nan=False, default=str)  # what is not finite has no JSON
    return found


def _number_or_switch(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, str) else found


def count_or_auto(value: Any) -> Any:
    """Of a union pydantic would say what is wrong with each of its members."""
    if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
        return value
    raise ValueError("write a number from 1 on, or auto")


def whole(value: Any) -> Any:
    """A number, where one is written as a text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def rate(value: Any) -> Any:
    """A learning rate, as `Rate.read` reads it."""
    if value is None:
        return None
    found = Rate.read(value)
    return str(found) if found.in_sigmas else found.number


def bound(value: Any) -> Any:
    """A constraint, without spaces."""
    text = str(value).replace(" ", "")
    if value is not None and not re.fullmatch(r"[^<>=]+(<=|>=)-?\d+(\.\d+)?(e[-+]?\d+)?", text):
        raise ValueError("write METRIC<=NUMBER or METRIC>=NUMBER, such as completions/mean_length<=20")
    return None if value is None else text

"""What a run and a server say to each other, as JSON: a call's name, its arguments and what comes back.

Prompts go by a name once they have been sent: a step's are the same for all of its members. Completions come as token
ids; their text is made where the run is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, Field, TypeAdapter

from estune.completion import Pictured, Sampling
from estune.es.strategy import Member, Update
from estune.pool.base import Description
from estune.tasks.pictures import as_picture
from estune.weights.policies import NoiseMode, PolicyName, Rounding

PATH = "/v1/estune"
"""Where the calls are, among the paths for which vLLM asks for its key."""
HEARTBEAT = 5.0
"""Seconds between signs of life while a call is at work: an empty line each."""
LEASE_SECONDS = 30.0
"""After so long without a call a server may be had by another run."""
PROMPTS_KEPT = 32
"""Sets of prompts that a server keeps by name."""
TURN_SECONDS = 0.1
"""How long a server waits for a turn to end, before it answers that none has."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run wants of a server: which weights are trained and how they are kept.

    Attributes:
        lease: a name of the run's own for as long as its process lasts; nobody else may call meanwhile.
        length: most tokens of a prompt and its completion; None if any will do.
        dtype: type that the live weights must have; None if any will do.
    """

    lease: str
    weights: PolicyName
    rounding: Rounding
    noise: NoiseMode
    train_parameters: str
    base_device: Literal["auto", "device", "host"] = "auto"
    length: int | None = None
    dtype: str | None = None
    sigma_scale: dict[str, float | Literal["rms"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a server says of itself before anything is asked of it."""

    model: str
    host: str
    pid: int
    software: dict[str, str]


@dataclass(frozen=True, slots=True)
class Opened:
    """What a server trains, and how many updates of this lease its weights have had; None: they are to be rebuilt."""

    description: Description
    done: int | None


Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Completed = list[Annotated[list[Token], Field(min_length=1)]]
"""Token ids of completions, none of which is empty."""
Seconds = Annotated[float, Field(ge=0, lt=1e9)]


@dataclass(frozen=True, slots=True)
class Answers:
    """As `Evaluated`, its completions as token ids."""

    token_ids: Completed
    perturb_time: Seconds
    generate_time: Seconds


@dataclass(frozen=True, slots=True)
class Swapped:
    """A swap that was made.

    Attributes:
        fingerprint: of the weights that are served now.
        how: "kept", if they were still there; "advanced" from those before, by `updates` more; else "rebuilt".
        updates: that were made for it.
        seconds: that it took in the server.
    """

    fingerprint: str
    how: Literal["kept", "advanced", "rebuilt"]
    updates: int
    seconds: float


Ids = list[list[int]]


@dataclass(frozen=True, slots=True)
class Sighted:
    """A prompt with pictures, as `Pictured` has it, with the bytes of their files, in base64 on the way."""

    ids: list[int]
    text: str
    pictures: list[Base64Bytes]
    marked: list[int]


Joined = tuple[int, list[int], Sampling]
"""A turn of a rollout that is asked for: its number, the token ids of its prompt, and how it is drawn."""
Ended = tuple[int, Annotated[list[Token], Field(min_length=1)]]
"""A turn that has ended: its number, and the token ids of its completion."""
ARGUMENTS: dict[str, TypeAdapter[Any]] = {
    "open": TypeAdapter(tuple[Terms]),
    "prompts": TypeAdapter(tuple[str, list[list[int] | Sighted]]),
    "evaluate": TypeAdapter(tuple[int, Member, float, str, Sampling]),
    "generate": TypeAdapter(tuple[int, str, Sampling]),
    "hold": TypeAdapter(tuple[int, str, Member | None, float]),
    "turns": TypeAdapter(tuple[str, list[Joined], list[int]]),
    "compare": TypeAdapter(tuple[int, str, Ids]),
    "apply": TypeAdapter(tuple[int, Update]),
    "rebuild": TypeAdapter(tuple[list[Update]]),
    "swap": TypeAdapter(tuple[list[Update], str, int]),
    "release": TypeAdapter(tuple[()]),
}
"""The calls there are, with what they take."""
RESULTS: dict[str, TypeAdapter[Any]] = {
    "open": TypeAdapter(Opened),
    "prompts": TypeAdapter(None),
    "evaluate": TypeAdapter(Answers),
    "generate": TypeAdapter(Completed),
    "hold": TypeAdapter(Seconds),
    "turns": TypeAdapter(list[Ended]),
    "compare": TypeAdapter(dict[str, float]),
    "apply": TypeAdapter(str),
    "rebuild": TypeAdapter(str),
    "swap": TypeAdapter(Swapped),
    "release": TypeAdapter(None),
}
GREETING = TypeAdapter(Greeting)
Failure = Literal["refused", "stale", "gone", "taken", "unknown prompts", "failed"]


def name_of(prompt_ids: Sequence[Sequence[int]]) -> str:
    """The name that prompts go by."""
    seen = [ids.pictures for ids in prompt_ids if isinstance(ids, Pictured)]
    return hashlib.blake2b(json.dumps([prompt_ids, seen]).encode(), digest_size=12).hexdigest()


def to_send(prompt: Sequence[int]) -> Sequence[int] | Sighted:
    """A prompt as it goes to a server."""
    if not isinstance(prompt, Pictured):
        return prompt
    return Sighted(list(prompt), prompt.text, [picture.data for picture in prompt.pictures], prompt.marked)


def as_sent(prompt: list[int] | Sighted) -> list[int]:
    """A prompt as it came to a server.

    Raises:
        EstuneError: a picture is none, or too large to be shown.
    """
    if not isinstance(prompt, Sighted):
        return prompt
    pictures = [as_picture(data, "a prompt") for data in prompt.pictures]
    return Pictured(prompt.ids, prompt.text, pictures, prompt.marked)

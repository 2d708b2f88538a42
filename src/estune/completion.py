"""What every engine speaks: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b
from typing import Any, Protocol


class Picture(str):
    """A picture in a prompt. As text it is a name made of its content, by which JSON and hashes know it.

    Attributes:
        data: the bytes of its file, such as PNG or JPEG.
    """

    __slots__ = ("data",)
    data: bytes

    def __new__(cls, data: bytes) -> Picture:
        """The picture of a file with these bytes."""
        self = super().__new__(cls, f"picture:{blake2b(data, digest_size=16).hexdigest()}")
        self.data = data
        return self

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        return Picture, (self.data,)


class Pictured(list[int]):
    """Token ids of a prompt with pictures, with those that stand for pictures.

    Args:
        ids: the token ids.
        text: the prompt as the chat template renders it, with one mark for each picture.
        pictures: in the order in which they stand there.
        marked: token ids of the text, with no more than the marks.
    """

    def __init__(self, ids: Sequence[int], text: str, pictures: Sequence[Picture], marked: Sequence[int]) -> None:
        super().__init__(ids)
        self.text = text
        self.pictures = tuple(pictures)
        self.marked = list(marked)

    def then(self, ids: Sequence[int]) -> Pictured:
        """The same with further tokens after it."""
        return Pictured([*self, *ids], self.text, self.pictures, self.marked)

    def __reduce__(self) -> tuple[type, tuple[list[int], str, tuple[Picture, ...], list[int]]]:
        return Pictured, (list(self), self.text, self.pictures, self.marked)


Message = dict[str, Any]
Prompt = str | list[Message]
"""Plain text, which is sent as it is, or a conversation, which the tokenizer's chat template renders."""


def content_text(content: Any) -> str:
    """The text of a message's content: a string, nothing, or a list of parts, whose texts are joined."""
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    return content or ""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a chat template is told beside a conversation.

    Attributes:
        date: the date that its `strftime_now` gives; today's if None.
        options: further variables of the template, such as `enable_thinking`, in JSON's types.
    """

    date: date | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy decoding, the paper's choice."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Played:
    """What became of a rollout.

    Attributes:
        reward: what it is worth; None if no reward applies, or it failed.
        metrics: further values that it gave.
        transcript: its messages, with the model's answers; pieces of text if the model continues a text.
        turns: number of the model's answers.
        failure: how it failed, a word of `FAILURES`; empty if it did not.
        why: the reason of the failure, in a line.
        first: token ids of its first prompt, and of the answer to it; empty if nothing was asked.
    """

    reward: float | None
    metrics: Mapping[str, float]
    transcript: list[Message]
    turns: int
    failure: str = ""
    why: str = ""
    first: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated answer.

    `token_ids` holds what was generated, the end token included; `text` is the same without special tokens;
    `finished` is False if `max_new_tokens` cut it off. For a rollout they are all tokens that were generated, the last
    answer, and whether no answer was cut off; `played` is what became of it. `kl` is the divergence of the weights that
    generated it from the base model, in nats a token over these tokens, where a run asks for it.
    """

    text: str
    token_ids: list[int]
    finished: bool
    played: Played | None = None
    kl: float | None = None

    def __reduce__(self) -> tuple[type, tuple[str, list[int], bool, Played | None, float | None]]:
        """Pickle it in half the time that a frozen dataclass takes by itself."""
        return Completion, (self.text, self.token_ids, self.finished, self.played, self.kl)


class Engine(Protocol):
    """Generates text with the weights it holds at that moment."""

    @property
    def dtype(self) -> str:
        """Type of the live weights: float32, bfloat16 or float16."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt. They are made once per step, not once per member."""
        ...

    def check(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Raise `EstuneError` for what `generate` would refuse."""
        ...

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        ...

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats) of every token of every completion."""
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...

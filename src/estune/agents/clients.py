"""Clients of an endpoint, each with a key: what it may ask, what it has under way, and what its turns came to."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from estune.agents.requests import Refusal
from estune.completion import Completion, Message
from estune.engines.continuous import Batcher, Request
from estune.errors import EstuneError

Asked = list[Message] | str | list[int]


@dataclass(frozen=True)
class Turn:
    """A prompt that was asked, and its answers.

    Attributes:
        messages: as they were sent; for /v1/completions the prompt, as text or token ids.
        tools: as they were sent.
        answers: the assistant's messages, as they were sent, with `tool_calls` where the model called functions; as
            many as the request asked for.
        completions: what the model generated for each.
        prompt_ids: token ids that the model was shown.
    """

    messages: Asked
    tools: tuple[dict[str, Any], ...]
    answers: tuple[Message, ...]
    completions: tuple[Completion, ...]
    prompt_ids: list[int]

    @property
    def answer(self) -> Message:
        """The first of the answers, which is the only one where `n` is not given."""
        return self.answers[0]


class Client:
    """The holder of a key: the weights that it may ask, and what it has under way."""

    def __init__(self, batcher: Batcher, seed: int, told: Callable[[Turn], None]) -> None:
        self.revoked = False
        self._batcher = batcher
        self._seed = seed
        self._told = told
        self._asked: Counter[int] = Counter()
        self._futures: set[Future[Completion]] = set()
        self._lock = threading.RLock()

    def seeds(self, ids: Sequence[int], given: int | None, count: int) -> list[int]:
        """A seed for each of `count` completions of a prompt, from the request's seed or else from the client's."""
        if given is not None:
            return [mixed_bits(given, index) for index in range(count)]
        prompt = mixed_bits(tuple(ids))
        with self._lock:
            times = self._asked[prompt]
            self._asked[prompt] += 1
        return [mixed_bits(self._seed, index, times, prompt) for index in range(count)]

    def submit(self, request: Request) -> Future[Completion]:
        """As `Batcher.submit`, for a prompt that has been checked.

        Raises:
            Refusal: the key was revoked, or the batcher has ended.
        """
        with self._lock:
            self.check()
            try:
                future = self._batcher.submit(request)
            except EstuneError as error:
                raise Refusal(503, str(error)) from error
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def expect(self, more: int) -> None:
        """As `Batcher.expect`."""
        self._batcher.expect(more)

    def tell(self, turns: Sequence[Turn]) -> None:
        """Tell the client's owner of turns.

        Raises:
            Refusal: the key was revoked.
        """
        with self._lock:
            self.check()
            for turn in turns:
                self._told(turn)

    def check(self) -> None:
        """Refuse, if the key was revoked."""
        if self.revoked:
            raise Refusal(401, "this key is no longer good for the weights that are served", "invalid_api_key")

    def revoke(self) -> None:
        """Cancel what is under way, and refuse what comes."""
        with self._lock:
            self.revoked = True
            for future in list(self._futures):
                future.cancel()


def mixed_bits(*values: Any) -> int:
    """A hash of the values, 63 bits."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest()) >> 1

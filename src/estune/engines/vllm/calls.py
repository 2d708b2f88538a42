"""What an engine over vLLM does, whether vLLM is in this process (`engine.py`) or in a server (`served.py`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from estune.completion import Completion, Picture, Pictured, Sampling
from estune.engines.progress import Meter
from estune.engines.prompts import PromptEncoder, completions_of
from estune.errors import EstuneError

Digest = list[dict[int, float]]
PROBE_PICTURE = Picture(b"P6 64 64 255 " + bytes((i * i * 7 + i // 192 * 5) % 256 for i in range(3 * 64 * 64)))
"""A picture of 64 x 64 pixels without a stretch of one colour."""


class VllmCalls(PromptEncoder):
    """Generates, scores and calls the workers' `Shard`s, by five calls that a subclass makes."""

    dtype: str
    """Type of the live weights."""
    parallel: int
    """Processes that share the model."""
    end_ids: Sequence[int]

    @abstractmethod
    def _tokens(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Token ids of each completion, the end token included."""

    @abstractmethod
    def _scores(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities (nats) of each row's tokens but the first."""

    @abstractmethod
    def _likely(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> Digest:
        """The few most likely tokens at each step of greedy decoding, with their log-probabilities (nats)."""

    @abstractmethod
    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each worker's `Shard`; return their answers, by rank."""

    @abstractmethod
    def _reset(self) -> bool:
        """Forget the keys and values kept of earlier prompts; False if that could not be done."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            EstuneError: a prompt is empty or, with `max_new_tokens`, longer than the model's positions or
                `vllm_max_model_length` reach, or `sampling` is out of range.
        """
        return self._complete(prompt_ids, sampling, lambda: self._tokens(prompt_ids, sampling))

    def _complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        work: Callable[[], list[list[int]]],
        members: int = 1,
    ) -> list[Completion]:
        """Completions from the token ids that `work` gives, of all prompts for each of some members."""
        if not prompt_ids:
            return []
        self.check(prompt_ids, sampling)
        meter = Meter()
        token_ids = work()
        tokens = sum(map(len, token_ids))
        meter.wrote(tokens, spared=len(token_ids) * sampling.max_new_tokens - tokens)
        meter.read(members * sum(map(len, prompt_ids)))  # between one another, vLLM reads and writes
        return completions_of(self.tokenizer, set(self.end_ids), token_ids)

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats) of the tokens of every completion, but of one that fills up the model's positions.

        To score a row vLLM needs room for a token more.
        """
        rows = []
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True):
            room = len(ids) if self.positions is None else max(0, self.positions - 1 - len(prompt))
            rows.append(prompt.then(ids[:room]) if isinstance(prompt, Pictured) else [*prompt, *ids[:room]])
        found = self._scores(rows)
        return [row[len(prompt) - 1 :] for prompt, row in zip(prompt_ids, found, strict=True)]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each worker's `Shard`; return their answers, by rank.

        Raises:
            EstuneError: one of them raised it.
        """
        answers = self._call(method, *args)
        for answer in answers:
            if isinstance(answer, EstuneError):
                raise answer
        return answers

    def forget(self) -> None:
        """Forget keys and values of earlier prompts, and what was made of pictures: other weights have computed it."""
        if not self._reset():
            raise EstuneError("vLLM keeps keys and values of other weights: prompts are still under way; start again")

    def digest(self) -> Digest:
        """Likely tokens and their log-probabilities for a few prompts, which differ for other weights."""
        self.forget()
        return self._likely([*self.probes(8), *self._picture_probes()], 2 if (self.positions or 8) > 2 else 1)

    def probes(self, tokens: int) -> list[list[int]]:
        """A few prompts of so many tokens, or as many as leave room for two."""
        size = self.config.get_text_config(decoder=True).vocab_size
        length = max(1, min(tokens, (self.positions or tokens + 2) - 2))
        return [[(row * 7919 + i * 104729 + 13) % size for i in range(length)] for row in range(3)]

    def _picture_probes(self) -> list[list[int]]:
        """A prompt with a picture, where the model can be shown one and there is room for it."""
        if self.vision is None:
            return []
        parts = [{"type": "image", "image": PROBE_PICTURE}, {"type": "text", "text": "?"}]
        try:
            found = self.encode([[{"role": "user", "content": parts}]])
        except EstuneError:  # there is no template or processor for it, which whoever shows one is told
            return []
        return found if self.positions is None or len(found[0]) + 2 <= self.positions else []

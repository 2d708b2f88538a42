"""Decoding through transformers' `generate`, for models whose state is not a plain key and value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from estune.completion import Sampling
from estune.engines.progress import Meter
from estune.engines.sampling import choose
from estune.engines.vision import Vision

SINGLE = {"rwkv"}
"""Types of models that take one prompt at a time, as transformers lets the rows of a batch leak into one another.

RWKV's last hidden states, `[rows, hidden]`, are added to those of a new token, `[rows, 1, hidden]`: each row meets all.
"""

UNCACHED = {"blt"}
"""Types of models that `generate` runs without a cache alone: transformers cannot make one of BLT's configuration."""


class GenerateDecoder:
    """Same calls as `Decoder`, at `generate`'s speed. Prompts of one batch must be of one length.

    They are not padded, because recurrent states differ in how, and whether, they skip padding. What their pictures
    give is of one shape, too.

    Attributes:
        single: whether a batch may hold one prompt only.
    """

    def __init__(self, model: Any, end_ids: Sequence[int], pad_id: int, vision: Vision | None = None) -> None:
        self.model = model
        self._vision = vision
        self.single = model.config.model_type in SINGLE
        self._end_ids = list(end_ids)
        self._pad_id = pad_id
        model.generation_config = GenerationConfig()  # `generate` obeys the checkpoint's in all that it is not told

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        sampling: Sampling,
        told: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Complete one batch of prompts of equal length; as `Decoder.run`.

        Args:
            prompts, indices, sampling: as for `Decoder.run`.
            told: called with each token as it is chosen; for a batch of one prompt.
        """
        ids = torch.tensor([list(prompt) for prompt in prompts], dtype=torch.int64, device=self.model.device)
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._end_ids,
            pad_token_id=self._pad_id,
            use_cache=self.model.config.model_type not in UNCACHED,
        )
        rows = torch.tensor(list(indices), dtype=torch.int64, device=ids.device)
        meter = Meter()
        seen = self._vision.inputs(prompts, ids.shape[1], next(self.model.parameters())) if self._vision else {}
        found = self.model.generate(
            ids,
            **seen,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choice(sampling, rows, ids.shape[1], meter)]),
            streamer=None if told is None else _Teller(told),
        )[:, ids.shape[1] :]
        meter.wrote(0, spared=len(ids) * (sampling.max_new_tokens - found.shape[1]))
        return torch.nn.functional.pad(found, (0, sampling.max_new_tokens - found.shape[1])).cpu()


class _Choice(LogitsProcessor):  # type: ignore[misc]  # transformers carries no types
    """Leaves one token per row, the one that `choose` takes, so that both decoders sample alike."""

    def __init__(self, sampling: Sampling, rows: torch.Tensor, prompt_length: int, meter: Meter) -> None:
        self._sampling = sampling
        self._rows = rows
        self._prompt_length = prompt_length
        self._meter = meter

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = input_ids.shape[1] - self._prompt_length
        token = choose(scores, self._sampling, self._rows, done)
        if not done:
            self._meter.read(input_ids.numel())
        self._meter.wrote(len(token))
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


class _Teller(BaseStreamer):  # type: ignore[misc]  # transformers carries no types
    """Passes on the tokens of a completion. What it is given first is the prompt."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._told(int(value))
        self._begun = True

    def end(self) -> None:
        """Does nothing, as no token is held back."""

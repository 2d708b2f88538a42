"""Generate with any causal language model that transformers can load, on CPU, CUDA or MPS."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estune.completion import Completion, Sampling
from estune.engines.continuous import Rounds, Rows
from estune.engines.cpu.fused import FusedDecoder, unfusable
from estune.engines.cpu.members import Drawn, Members, Together
from estune.engines.cpu.rows import FusedRows
from estune.engines.decode import Decoder, unsupported
from estune.engines.generate import GenerateDecoder
from estune.engines.graph import CudaRecorder, GraphDecoder, uncapturable
from estune.engines.loading import load_model, open_vision
from estune.engines.memory import cached_elements, fitting_rows, keep_freed_memory, memory_for, total_memory
from estune.engines.prompts import PromptEncoder, completions_of
from estune.engines.rotation import short_reach
from estune.engines.score import log_probabilities
from estune.engines.together import RowMembers, RowsTogether, rows_together
from estune.engines.tokenizer import end_tokens, load_tokenizer, pad_token
from estune.errors import EstuneError
from estune.weights.device import pick_device
from estune.weights.locate import locate

MAX_ROWS = {"cpu": 256}
"""Rows per batch that still gain from one another: beyond, a CPU's caches lose more than larger products win."""
MAX_ROWS_ELSEWHERE = 1024
TOGETHER = {"cpu", "cuda"}
"""Devices on which members of low-rank noise are decoded together by a model's own forward."""
SCORE_COPIES = 4  # copies of a batch's logits in float32 that there are while completions are scored
MEMORY_SHARE = 4
"""A batch takes at most a fourth of the memory that a device has beyond the model's weights."""

log = logging.getLogger(__name__)
AnyDecoder = Decoder | FusedDecoder | GenerateDecoder


class TransformersEngine(PromptEncoder):
    """An `Engine` over a transformers model, its weights open to be changed in place between calls.

    Args:
        model: directory, hub id or embedded name of a causal language model.
        dtype: "auto", "float32", "bfloat16", "float16", or a torch type. "auto" is the checkpoint's own type, but
            float32 on a CPU.
        device: "auto" (CUDA, then MPS, then CPU) or what `torch.device` takes.
        batch_size: rows decoded together; None chooses by the memory that the device has, whatever of it is in use.
        cuda_graphs: on CUDA, capture decoding steps as CUDA graphs and replay them, where the model permits it.
        sharers: engines that share the device's memory, this one included.
        trust_remote_code: run the code that the model brings, if it does.
        plain: as `load_model` takes it.

    Greedy completions are the model's own: the largest logit, no repetition penalty or other processor that a
    checkpoint's generation config may ask for. Same prompts and weights give the same completions, whatever was
    generated before. One engine serves one thread.

    Raises:
        EstuneError: the model cannot be loaded or used; the message says why and what to do.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        cuda_graphs: bool = True,
        sharers: int = 1,
        trust_remote_code: bool = False,
        plain: bool = False,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise EstuneError(
                f"batch_size: {batch_size} leaves no row to decode; give 1 or more, or null for automatic"
            )
        self.batch_size = batch_size
        self.device = pick_device(device)
        path = locate(model)
        self.model: Any = load_model(path, dtype, self.device, trust_remote_code=trust_remote_code, plain=plain)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        vision = open_vision(path, self.model.config, trust_remote_code=trust_remote_code)
        super().__init__(str(model), tokenizer, self.model.config, vision=vision)
        weights: int = sum(parameter.nbytes for parameter in self.model.parameters())
        self.batch_memory = (total_memory(self.device) // sharers - weights) // MEMORY_SHARE
        """Bytes that a batch may take."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self.end_ids = end_tokens(self.model, self.tokenizer)
        self.decoder = self.make_decoder(cuda_graphs)
        self._short = short_reach(self.model.config)
        self._rows: FusedRows | None = None

    def make_decoder(self, cuda_graphs: bool) -> AnyDecoder:
        """The fastest decoder that this model and device allow; `cuda_graphs` allows those that replay graphs."""
        model = self.model
        pad = pad_token(self.tokenizer)
        if not unfusable(model):
            return FusedDecoder(model, self.end_ids)
        if unsupported(model):
            return GenerateDecoder(model, self.end_ids, pad, self.vision)
        if cuda_graphs and self.device.type == "cuda" and not uncapturable(model):
            return GraphDecoder(model, self.end_ids, pad, CudaRecorder(model.device))
        return Decoder(model, self.end_ids, pad)

    @property
    def dtype(self) -> str:
        """Type of the live weights: float32, bfloat16 or float16."""
        return str(self.model.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Does nothing: the model goes with the last reference."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            EstuneError: a prompt is empty or, with `max_new_tokens`, longer than the model's positions reach, or
                `sampling` is out of range.
        """
        return self._complete(
            prompt_ids, sampling, lambda decoder, batch: decoder.run([prompt_ids[i] for i in batch], batch, sampling)
        )

    def together(self, tensors: Mapping[int, Drawn]) -> Together | RowsTogether | None:
        """What draws members that `generate_each` takes; None where this model's cannot be decoded together.

        Args:
            tensors: what members perturb, by the address of its memory.
        """
        if self._short is not None or isinstance(self.decoder, GenerateDecoder):
            return None
        if isinstance(self.decoder, FusedDecoder):
            return self.decoder.together(tensors)
        if self.device.type not in TOGETHER or hasattr(self.model, "peft_config"):
            return None
        found = rows_together(self.model, tensors)
        if isinstance(found, str):
            log.warning("members of low-rank noise are decoded one by one, as %s", found)
            return None
        return found

    def members_at_once(self, together: Together | RowsTogether, prompts: int, slots: int) -> int:
        """How many members `generate_each` takes at once, with so many prompts each of `slots` tokens at most."""
        rows = self.batch_size or self.fitting_rows(slots)
        most = rows // prompts
        if isinstance(together, RowsTogether):
            most = min(most, self.batch_memory // together.member_bytes)
        return max(1, most)

    def generate_each(
        self, members: Members | RowMembers, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """As `generate`, by the weights of each member, `[members][prompts]`, decoded together."""
        prompts = len(prompt_ids)
        count = members.count

        def run(decoder: AnyDecoder, batch: list[int]) -> torch.Tensor:
            assert not isinstance(decoder, GenerateDecoder)
            owners, numbers = np.divmod(batch, prompts)
            own: Any = members.with_owners(owners)  # of the kind that this decoder takes
            return decoder.run([prompt_ids[i] for i in numbers], numbers.tolist(), sampling, members=own)

        found = self._complete([*prompt_ids] * count, sampling, run)
        return [found[i : i + prompts] for i in range(0, count * prompts, prompts)] if prompts else [[]] * count

    def _complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        run: Callable[[AnyDecoder, list[int]], torch.Tensor],
    ) -> list[Completion]:
        """One completion per prompt, by what a decoder makes of a batch of their numbers."""
        if not prompt_ids:
            return []
        self.check(prompt_ids, sampling)
        ends = set(self.end_ids)
        token_ids: list[list[int]] = [[] for _ in prompt_ids]
        for decoder, batch in self.batches(prompt_ids, sampling.max_new_tokens):
            with memory_for("the activations of a batch", "lower batch_size or max_new_tokens"):
                rows = run(decoder, batch).tolist()
            for i, row in zip(batch, rows, strict=True):
                stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
                token_ids[i] = row[:stop]
        return completions_of(self.tokenizer, ends, token_ids)

    def open_rows(self) -> Rows:
        """An empty batch that prompts join and leave, for the weights as they are."""
        if not isinstance(self.decoder, FusedDecoder) or self._short is not None:
            return Rounds(self.generate)
        if self._rows is None:
            self._rows = FusedRows(self.decoder, self.fitting_rows)
        self._rows.clear()
        return self._rows

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, told: Callable[[str], None]) -> Completion:
        """Complete one prompt, and pass its text on as it grows: by the fused decoder or transformers' `generate`.

        Args:
            prompt_ids: its token ids.
            sampling: how tokens are drawn.
            told: called with the text so far, after each token with which a whole character ends, and at the end.
                What it raises ends the completion.

        Returns:
            The completion that `generate` gives, but for what rounding does to near-ties.

        Raises:
            EstuneError: as `generate`.
        """
        self.check([prompt_ids], sampling)
        token_ids: list[int] = []

        def hear(token: int) -> None:
            token_ids.append(token)
            text = self._text(token_ids)
            if not text.endswith("\ufffd"):
                told(text)

        decoder = self.decoder
        if not isinstance(decoder, FusedDecoder) or self._short is not None:
            decoder = GenerateDecoder(self.model, self.end_ids, pad_token(self.tokenizer), self.vision)
        with memory_for("the answer", "lower max_new_tokens"):
            decoder.run([prompt_ids], [0], sampling, hear)
        completion = Completion(self._text(token_ids), token_ids, finished=token_ids[-1] in self.end_ids)
        told(completion.text)
        return completion

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats) of every token of every completion under the live weights."""
        logits = self.batch_memory // (4 * SCORE_COPIES)
        with memory_for("the logits of a batch", "lower max_new_tokens"):
            if not isinstance(self.decoder, FusedDecoder):
                return log_probabilities(self.model, prompt_ids, completion_ids, logits, self.vision)
            found = []
            most = self.fitting_rows(max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)))
            for start in range(0, len(prompt_ids), most):
                part = slice(start, start + most)
                found += self.decoder.score(prompt_ids[part], completion_ids[part], logits)
            return found

    def batches(self, prompt_ids: Sequence[Sequence[int]], new: int) -> Iterator[tuple[AnyDecoder, list[int]]]:
        """Prompt numbers by rising length, in batches of equal size, each with its decoder.

        A batch is of equal lengths, and of pictures alike, where its decoder asks for it, and where texts grow beyond a
        model's short ones.
        """
        kinds = [(len(ids), self.vision.kind(ids) if self.vision else ()) for ids in prompt_ids]
        order = sorted(range(len(prompt_ids)), key=lambda i: kinds[i])
        most = self.batch_size or self.fitting_rows(len(prompt_ids[order[-1]]) + new)
        mixed = 0 if isinstance(self.decoder, GenerateDecoder) else len(order)
        if self._short is not None:
            mixed = min(mixed, sum(len(ids) + new - 1 <= self._short for ids in prompt_ids))  # the last one is not read
        groups: list[tuple[AnyDecoder, list[int]]] = [(self.decoder, order[:mixed])]
        if mixed < len(order):
            alike = GenerateDecoder(self.model, self.end_ids, pad_token(self.tokenizer), self.vision)
            groups += [(alike, list(group)) for _, group in groupby(order[mixed:], key=lambda i: kinds[i])]
        for decoder, group in groups:
            single = isinstance(decoder, GenerateDecoder) and decoder.single
            count = len(group) if single else math.ceil(len(group) / most)
            for part in range(count):
                yield decoder, group[len(group) * part // count : len(group) * (part + 1) // count]

    def fitting_rows(self, slots: int) -> int:
        """Rows of `slots` tokens that fit in a batch's memory, within what is fast on this device.

        The memory that is free now does not count: another batch size can round differently, and a run could not be
        repeated.
        """
        config = self.model.config.get_text_config(decoder=True)
        cache = cached_elements(config) * slots * self.model.dtype.itemsize
        most = MAX_ROWS.get(self.device.type, MAX_ROWS_ELSEWHERE)
        return fitting_rows(self.batch_memory, cache=cache, vocabulary=config.vocab_size, most=most)

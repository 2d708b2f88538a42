"""Generate with any causal language model that transformers can load, on CPU, CUDA or MPS."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from estune.checkpoint import locate
from estune.engines.base import Completion, Prompt, Sampling
from estune.engines.decode import Decoder, unsupported
from estune.engines.generate import GenerateDecoder
from estune.engines.loading import end_tokens, load_model, load_tokenizer, pad_token, pick_device
from estune.engines.memory import keep_freed_memory, total_memory
from estune.errors import EstuneError

MAX_ROWS = {"cpu": 256}
"""Rows per batch that still gain from one another: beyond, a CPU's caches lose more than larger products win."""
MAX_ROWS_ELSEWHERE = 1024
MEMORY_SHARE = 4
"""A batch takes at most this part, one in so many, of the memory that a device has beyond the model's weights."""


class TransformersEngine:
    """An `Engine` over a transformers model, its weights open to be changed in place between calls.

    Args:
        model: directory, hub id or embedded name of a causal language model.
        dtype: "auto", "float32", "bfloat16", "float16", or a torch type. "auto" is the checkpoint's own type, but
            float32 on a CPU.
        device: "auto" (CUDA, then MPS, then CPU) or what `torch.device` takes.
        batch_size: rows decoded together; None chooses by the memory that the device has, whatever of it is in use.

    Greedy completions are the model's own: the largest logit, no repetition penalty or other processor that a
    checkpoint's generation config may ask for. Same prompts and weights give the same completions, whatever was
    generated before. One engine serves one thread; `replica` makes another.

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
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise EstuneError(
                f"batch_size: {batch_size} leaves no row to decode; give 1 or more, or null for automatic"
            )
        self.name = str(model)
        self.batch_size = batch_size
        self.device = pick_device(device)
        path = locate(model)
        self.model: Any = load_model(path, dtype, self.device)
        self.tokenizer: Any = load_tokenizer(path)
        weights: int = sum(parameter.nbytes for parameter in self.model.parameters())
        self._batch_memory = (total_memory(self.device) - weights) // MEMORY_SHARE
        if self.device.type == "cpu":
            keep_freed_memory()
        self._attach()

    def _attach(self) -> None:
        """Make what belongs to this engine's own copy of the model."""
        self.end_ids = end_tokens(self.model, self.tokenizer)
        kind = GenerateDecoder if unsupported(self.model) else Decoder
        self._decoder: Decoder | GenerateDecoder = kind(self.model, self.end_ids, pad_token(self.tokenizer))

    def replica(self) -> TransformersEngine:
        """A second engine with its own copy of the weights as they are now, for another thread.

        Tied weights stay tied. The tokenizer is shared.
        """
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin._attach()
        return twin

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt.

        Text is encoded with the tokenizer's own special tokens; a conversation by the chat template, which brings
        them, and a conversation that ends with the assistant is left open for it to go on.

        Raises:
            EstuneError: a prompt is empty, or a conversation meets no chat template or one that refuses it.
        """
        found: list[list[int]] = [[] for _ in prompts]
        for kind, special in ((str, True), (list, False)):
            chosen = [i for i, prompt in enumerate(prompts) if isinstance(prompt, kind)]
            if not chosen:
                continue
            texts = [self._render(i, prompts[i]) for i in chosen]
            for i, ids in zip(chosen, self.tokenizer(texts, add_special_tokens=special)["input_ids"], strict=True):
                found[i] = ids
        for i, ids in enumerate(found):
            if not ids:
                raise EstuneError(f"prompt {i}: {prompts[i]!r} encodes to no token; give it text")
        return found

    def _render(self, index: int, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        if not prompt:
            raise EstuneError(f"prompt {index}: a conversation without messages; give it at least one")
        if self.tokenizer.chat_template is None:
            raise EstuneError(
                f"prompt {index}: a conversation, but the tokenizer of {self.name!r} has no chat template; "
                "give plain text, or a model with a template"
            )
        proceed = prompt[-1].get("role") == "assistant"
        try:
            text: str = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=not proceed, continue_final_message=proceed
            )
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            why = str(error).strip().partition("\n")[0]
            raise EstuneError(
                f"prompt {index}: the chat template of {self.name!r} refuses it ({why}); messages need a role and a "
                "content that the template knows"
            ) from error
        return text

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            EstuneError: a prompt is empty or, with `max_new_tokens`, longer than the model's positions reach, or
                `sampling` is out of range.
        """
        if not prompt_ids:
            return []
        self.check(prompt_ids, sampling)
        ends = set(self.end_ids)
        token_ids: list[list[int]] = [[] for _ in prompt_ids]
        for batch in self._batches(prompt_ids, sampling.max_new_tokens):
            rows = self._decoder.run([prompt_ids[i] for i in batch], batch, sampling).tolist()
            for i, row in zip(batch, rows, strict=True):
                stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
                token_ids[i] = row[:stop]
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [Completion(text, ids, finished=ids[-1] in ends) for text, ids in zip(texts, token_ids, strict=True)]

    def check(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse, as `generate` would, what cannot be generated; for those who want to know before they begin."""
        if sampling.max_new_tokens < 1:
            raise EstuneError(f"max_new_tokens: {sampling.max_new_tokens} leaves nothing to generate; give at least 1")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
            raise EstuneError(
                f"sampling: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}; "
                "needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0 (0: all tokens)"
            )
        reach = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for i, ids in enumerate(prompt_ids):
            if not ids:
                raise EstuneError(f"prompt {i}: no tokens; a prompt needs at least one")
            if reach is not None and len(ids) + sampling.max_new_tokens > reach:
                raise EstuneError(
                    f"prompt {i}: {len(ids)} tokens and max_new_tokens {sampling.max_new_tokens} go beyond the "
                    f"{reach} positions of {self.name!r}; shorten the prompt or lower max_new_tokens"
                )

    def _batches(self, prompt_ids: Sequence[Sequence[int]], new: int) -> Iterator[list[int]]:
        """Prompt numbers by rising length, in batches of equal size; of equal length where the decoder asks for it."""
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
        most = self.batch_size or self._fitting_rows(len(prompt_ids[order[-1]]) + new)
        groups = [order]
        if isinstance(self._decoder, GenerateDecoder):
            groups = [list(group) for _, group in groupby(order, key=lambda i: len(prompt_ids[i]))]
        for group in groups:
            count = math.ceil(len(group) / most)
            for part in range(count):
                yield group[len(group) * part // count : len(group) * (part + 1) // count]

    def _fitting_rows(self, slots: int) -> int:
        """Rows of `slots` tokens that fit in a batch's memory, within what is fast on this device.

        Never by the memory free now: another batch size can round differently, and a run could not be repeated.
        """
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * heads * width * slots * self.model.dtype.itemsize
        logits = 3 * 4 * config.vocab_size  # in float32, with what softmax or argmax keeps beside them
        limit = MAX_ROWS.get(self.device.type, MAX_ROWS_ELSEWHERE)
        return max(1, min(limit, self._batch_memory // int(cache + logits)))

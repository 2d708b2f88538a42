"""The decode loop: prompts' token ids in, completions' token ids out, over the model's own forward.

What makes it faster than `generate`: the prefix that all prompts share is computed once; the rest is prefilled in
pieces that stay in cache memory; keys and values live in storage that no call allocates anew; masks and positions are
ready before the first token; rows that have finished leave the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from estune.completion import Sampling
from estune.engines import attention
from estune.engines.cache import RowCache
from estune.engines.memory import ORDINARY_LAYERS
from estune.engines.progress import Meter
from estune.engines.sampling import choose
from estune.engines.together import RowMembers
from estune.engines.tree import common_prefix

PREFILL_TOKENS = {"cpu": 1024}
"""Tokens in one prefill forward: as many as keep the activations of a small model in a core's cache."""
PREFILL_TOKENS_ELSEWHERE = 16384
CHECK_EVERY = {"cpu": 1}
"""Steps between two looks at which rows have finished, as each look waits for the device."""
CHECK_EVERY_ELSEWHERE = 8

_ARGUMENTS = {"position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_WINDOW_OF_CACHE = {"moshi"}
"""Types of models whose masks know no window, where the cache that transformers makes for them has one."""
_WINDOWS = ("sliding_window", "attention_chunk_size")


def unsupported(model: Any) -> str | None:
    """Why this loop cannot serve `model`, or None.

    It asks for what transformers' current decoder models share: attention in every layer over an ordinary key and
    value cache, masks and position ids taken as arguments, and logits of the last position alone.
    """
    config = model.config
    unusual = set(getattr(config, "layer_types", None) or ()) - ORDINARY_LAYERS
    lacking = _ARGUMENTS - set(inspect.signature(model.forward).parameters)
    reasons = {
        "its state is recurrent": model._is_stateful,
        "its attention takes no prepared mask": not model._supports_attention_backend,
        "it is a composite model": config.get_text_config(decoder=True) is not config,
        "its window is its cache's alone": config.model_type in _WINDOW_OF_CACHE,
        "its layers share caches": getattr(config, "kv_sharing_modes", None)
        or getattr(config, "num_kv_shared_layers", 0),
        f"it has layers of type {', '.join(sorted(unusual))}": unusual,
        f"its forward takes no {', '.join(sorted(lacking))}": lacking,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Decoder:
    """Decodes batches with one model and one cache; not for two threads at a time.

    Attributes:
        prefill_tokens: tokens of prompts that are computed at once.
        check_every: steps between two looks at which rows have ended.
    """

    def __init__(self, model: Any, end_ids: Sequence[int], pad_id: int) -> None:
        attention.install(model)
        self.model = model
        self.cache = RowCache(model.config.num_hidden_layers)
        self._members: RowMembers | None = None  # whose rows are decoded
        self._device: torch.device = model.device
        self._end_ids = torch.tensor(list(end_ids), dtype=torch.int64, device=self._device)
        self._pad_id = pad_id
        self.prefill_tokens = PREFILL_TOKENS.get(self._device.type, PREFILL_TOKENS_ELSEWHERE)
        self.check_every = CHECK_EVERY.get(self._device.type, CHECK_EVERY_ELSEWHERE)
        windows = [getattr(model.config, name, None) for name in _WINDOWS]
        self._window: int | None = min((w for w in windows if w is not None), default=None)

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        sampling: Sampling,
        members: RowMembers | None = None,
    ) -> torch.Tensor:
        """Complete one batch.

        Args:
            prompts: token ids of each, none empty; prompts of like length side by side are computed fastest.
            indices: numbers of the prompts, for sampling.
            sampling: how tokens are drawn.
            members: whose weights complete the prompts; by default those that the model has.

        Returns:
            int64 `[prompts, max_new_tokens]` on the CPU; what follows a row's first end token is meaningless.
        """
        slots = max(map(len, prompts)) + sampling.max_new_tokens
        # A model that looks back by slots, not by positions, must not find padding between prefix and prompt.
        plain = self._window is None or slots < self._window
        batch = Batch.lay(prompts, indices, slots, self._pad_id, plain=plain, like=self.model)
        batch.owners = None if members is None else members.owners
        meter = Meter()
        self._open(batch)
        self._members = members
        with members.together.added() if members is not None else nullcontext():
            return self._decode(batch, self._prefill(batch, sampling, meter), sampling, meter).cpu()

    def _open(self, batch: Batch) -> None:
        self.cache.open(len(batch.pads), batch.slots)

    def _prefill(self, batch: Batch, sampling: Sampling, meter: Meter) -> torch.Tensor:
        """Fill the cache with the prompts; return each row's first token `[rows]`."""
        cache = self.cache
        shared = batch.shared
        rows = len(batch.pads)
        if shared:
            owners, of_row = (None, None) if batch.owners is None else torch.unique(batch.owners, return_inverse=True)
            firsts = 1 if owners is None else len(owners)  # a beginning for each member
            cache.at(slice(0, firsts), 0)
            ids = batch.prefix.expand(firsts, -1)
            self.forward(ids, torch.arange(shared, device=self._device)[None], None, owners)
            cache.spread(shared, of_row)
        first: list[torch.Tensor] = []
        done = 0
        while done < rows:
            # The longest prompts come last, so a piece's last row is its widest.
            share = max(1, self.prefill_tokens // (batch.width - shared))
            piece = slice(done, min(rows, done + share))
            begin = shared + min(batch.pads[piece])
            cache.at(piece, begin, gap=begin - shared)
            logits = self.forward(
                batch.ids[piece, begin - shared :],
                batch.positions(piece, begin),
                batch.prefill_mask(piece, begin),
                None if batch.owners is None else batch.owners[piece],
            )
            first.append(choose(logits, sampling, batch.rows[piece], 0))
            meter.read(sum(batch.width - pad for pad in batch.pads[piece]))
            done = piece.stop
        cache.at(slice(0, rows), batch.width)
        return torch.cat(first)

    def _decode(self, batch: Batch, token: torch.Tensor, sampling: Sampling, meter: Meter) -> torch.Tensor:
        """Add a token to every row until all have ended; return the completions `[rows, max_new_tokens]`."""
        new = sampling.max_new_tokens
        out = torch.zeros(len(token), new, dtype=torch.int64, device=self._device)
        out[:, 0] = token
        meter.wrote(len(token))
        ended = self._is_end(token)
        alive = torch.arange(len(token), device=self._device)
        positions = batch.next_positions()
        for step in range(1, new):
            if step % self.check_every == 0:
                left = len(token) - int(ended.sum())
                meter.wrote(0, spared=(len(token) - left) * (new - step))
                if left == 0:
                    break
                if left < len(token):
                    keep = self._drop(ended, left)
                    alive = alive[keep]
                    token = token[keep]
                    ended = ended[keep]
                    batch.drop(keep)
                    positions = positions if len(positions) == 1 else positions[keep]
            mask = batch.decode_mask(self.cache.length + 1)
            logits = self.forward(token[:, None], positions, mask, batch.owners)
            self.cache.length += 1
            positions = positions + 1
            token = choose(logits, sampling, batch.rows, step)
            out[alive, step] = token
            meter.wrote(len(token))
            ended |= self._is_end(token)
        return out

    def _drop(self, ended: torch.Tensor, left: int) -> torch.Tensor:
        """Move rows from the end into the gaps that ended rows leave; return the old index of each row kept.

        Args:
            ended: bool `[rows]`.
            left: how many of them are False.
        """
        keep = torch.arange(left, device=self._device)
        gaps = ended[:left].nonzero().squeeze(1)
        movers = left + (~ended[left:]).nonzero().squeeze(1)
        if len(gaps):
            self.cache.move(movers, gaps)
            keep[gaps] = movers
        self.cache.at(slice(0, left), self.cache.length)
        return keep

    def _is_end(self, token: torch.Tensor) -> torch.Tensor:
        return (token[:, None] == self._end_ids).any(dim=1)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        owners: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the last position, `[rows, vocabulary]`; `owners` are the members whose the rows are."""
        if self._members is not None and owners is not None:
            self._members.rows.owners = owners
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@dataclass(slots=True)
class Batch:
    """How prompts lie in the cache: `[shared prefix | padding | rest of the prompt | completion]`.

    `plain` batches pass prepared additive masks. Others, whose model looks back over a window, pass the 2D mask of
    real tokens and let the model build its own, and share no prefix.
    """

    prefix: torch.Tensor  # [1, shared]
    ids: torch.Tensor  # [rows, width - shared], padded on the left
    pads: list[int]  # padding of each row
    pads_column: torch.Tensor  # [rows, 1]
    rows: torch.Tensor  # [rows] prompt indices
    bias: torch.Tensor | None  # [rows, 1, 1, slots], 0 or the lowest number; None without padding
    real: torch.Tensor | None  # [rows, slots], False for padding; None where plain
    dtype: torch.dtype
    shared: int
    width: int
    slots: int
    owners: torch.Tensor | None = None  # [rows], the members that complete the prompts, where these are several

    @classmethod
    def lay(
        cls,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        slots: int,
        pad_id: int,
        *,
        plain: bool,
        like: Any,
    ) -> Batch:
        """Lay prompts out in `slots` slots, in the type and on the device of the model `like`."""
        dtype = like.dtype
        device = like.device
        width = max(map(len, prompts))
        shared = common_prefix(prompts) if plain and len(prompts) > 1 else 0
        pads = [width - len(prompt) for prompt in prompts]
        ids = [[pad_id] * pad + list(prompt[shared:]) for pad, prompt in zip(pads, prompts, strict=True)]
        column = torch.tensor(pads, device=device)[:, None]
        slot = torch.arange(slots, device=device)
        real = (slot < shared) | (slot >= shared + column)
        bias = None
        if plain and any(pads):
            bias = torch.zeros(real.shape, dtype=dtype, device=device)
            bias = bias.masked_fill_(~real, torch.finfo(dtype).min)[:, None, None]
        return cls(
            prefix=torch.tensor([list(prompts[0][:shared])], dtype=torch.int64, device=device),
            ids=torch.tensor(ids, dtype=torch.int64, device=device),
            pads=pads,
            pads_column=column,
            rows=torch.tensor(list(indices), dtype=torch.int64, device=device),
            bias=bias,
            real=None if plain else real,
            dtype=dtype,
            shared=shared,
            width=width,
            slots=slots,
        )

    @property
    def plain(self) -> bool:
        """Whether masks are prepared and slots stand for nothing but storage."""
        return self.real is None

    def positions(self, piece: slice, begin: int) -> torch.Tensor:
        """Positions of a piece's tokens from slot `begin` on, `[rows, tokens]`, or `[1, tokens]` without padding."""
        slots = torch.arange(begin, self.width, device=self.ids.device)[None]
        if not any(self.pads):
            return slots
        return (slots - self.pads_column[piece]).clamp_(min=0)

    def next_positions(self) -> torch.Tensor:
        """Position of the first generated token, `[rows, 1]` or `[1, 1]`."""
        return self.width - self.pads_column if any(self.pads) else self.pads_column[:1] + self.width

    def prefill_mask(self, piece: slice, begin: int) -> torch.Tensor | None:
        """Mask of a piece whose first token stands at slot `begin`; None says plainly causal.

        Additive, `[rows or 1, 1, tokens, width]`; of batches that are not plain the real tokens, `[rows, width]`.
        """
        if self.real is not None:
            return self.real[piece, : self.width]
        if begin == 0 and not any(self.pads[piece]):
            return None
        slots = torch.arange(self.width, device=self.ids.device)
        later = slots > slots[begin:, None]
        # A padding token sees nothing, but the lowest number, unlike -inf, leaves its softmax finite.
        hidden = torch.zeros(later.shape, dtype=self.dtype, device=slots.device)
        hidden = hidden.masked_fill_(later, torch.finfo(self.dtype).min)[None, None]
        return hidden if self.bias is None else torch.minimum(hidden, self.bias[piece, ..., : self.width])

    def decode_mask(self, length: int) -> torch.Tensor | None:
        """Mask of one new token per row that sees `length` slots: additive, `[rows, 1, 1, length]`, or as above."""
        if self.real is not None:
            return self.real[:, :length]
        return None if self.bias is None else self.bias[..., :length]

    def drop(self, keep: torch.Tensor) -> None:
        """Keep the rows of these numbers, `[rows kept]`, in this order."""
        self.rows = self.rows[keep]
        self.bias = None if self.bias is None else self.bias[keep]
        self.real = None if self.real is None else self.real[keep]
        self.owners = None if self.owners is None else self.owners[keep]

"""Choosing the next token. Random choices depend on (seed, prompt, position) alone, not on how rows are batched."""

from __future__ import annotations

import torch

from estune.completion import Sampling

_LOW32 = 0xFFFFFFFF


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    rows: torch.Tensor,
    position: int | torch.Tensor,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row.

    `seed` and `position` can be on the device: then nothing that changes from call to call is a Python number.

    Args:
        logits: `[rows, vocabulary]`.
        sampling: how tokens are drawn.
        rows: each row's prompt index, `[rows]`.
        position: tokens generated before: a number, or int64 `[1]` or `[rows]`.
        seed: in the place of `sampling`'s, int64 `[1]` or `[rows]`.

    Returns:
        Token ids `[rows]`, int64: the largest logit at temperature 0, else a draw.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    weights = truncate(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)
    # In float64, as a running float32 sum over a large vocabulary loses its rare tokens; MPS has no float64.
    total = weights.cumsum(dim=-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64)
    draw = uniform(sampling.seed if seed is None else seed, rows, position)
    aim = draw.to(total.dtype).unsqueeze(1) * total[:, -1:]
    return torch.searchsorted(total, aim, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def truncate(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits `[rows, vocabulary]` with all but the `top_k` largest (0: all), then all outside the nucleus, at -inf.

    The nucleus is the smallest set of most probable tokens whose probability reaches `top_p` (1: all tokens).
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(dim=-1)
        outside = share.cumsum(dim=-1) - share >= top_p  # the mass before a token already suffices
        outside[:, 0] = False
        logits = logits.masked_fill(torch.empty_like(outside).scatter_(1, order, outside), float("-inf"))
    return logits


def uniform(seed: int | torch.Tensor, rows: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """A number in (0, 1) for each of `rows` `[rows]`, float32 with 24 bits: a hash of (seed, row, position).

    32-bit arithmetic in int64 tensors, so that CPU, CUDA and MPS agree.
    """
    state = _mix(rows.to(torch.int64) & _LOW32, seed & _LOW32)
    state = _mix(state, (seed >> 32) & _LOW32)
    state = _mix(state, position & _LOW32)
    return ((state >> 8).to(torch.float32) + 0.5) * 2.0**-24


def _mix(state: torch.Tensor, word: int | torch.Tensor) -> torch.Tensor:
    """Stir one 32-bit word into 32-bit states: MurmurHash3's finalizer, twice, around the word."""
    for value in (word, 0x9E3779B9):
        state = (state ^ value) & _LOW32
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _LOW32
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _LOW32
        state = state ^ (state >> 16)
    return state

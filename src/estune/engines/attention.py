"""Attention of one new token per row, on a CPU core, in one pass over keys and values.

PyTorch's kernel spends most of such a call on setting up a matrix product for every row and head. This one takes a
third of its time for the embedded model. It is registered with transformers as an attention function of its own, which
models call as they call any other. It serves float32, one query per row and one thread; the rest goes to PyTorch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "estune"
_NO_BIAS = np.zeros((0, 0), dtype=np.float32)
# Arguments that change what attention computes; a model that passes one is served by PyTorch.
_SPECIAL = ("position_bias", "cache", "softcap", "s_aux")


def install(model: Any) -> None:
    """Let `model` use this attention, where it uses PyTorch's on a CPU in float32. Weights are not touched."""
    if model.device.type == "cpu" and model.dtype == torch.float32 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: `[rows, heads, queries, dim]` in, `[rows, queries, heads, dim]` out."""
    rows, heads, queries, dim = query.shape
    fits = (
        queries == 1
        and query.dtype == torch.float32
        and torch.get_num_threads() == 1
        and _is_compact(key)
        and _is_compact(value)
        and value.shape[-1] == dim
        and (attention_mask is None or _is_bias(attention_mask, rows, key.shape[2]))
        and not any(kwargs.get(name) is not None for name in _SPECIAL)
    )
    if not fits:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    out = query.new_empty(rows, 1, heads, dim)
    grouped = (rows, key.shape[1], heads // key.shape[1], dim)
    _kernel(grouped[2], dim)(
        query.reshape(grouped).contiguous().numpy(),
        _whole(key).numpy(),
        _whole(value).numpy(),
        key.shape[2],
        _NO_BIAS if attention_mask is None else attention_mask.reshape(rows, -1).numpy(),
        np.float32(dim**-0.5 if scaling is None else scaling),
        out.view(grouped).numpy(),
    )
    return out, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _is_compact(states: torch.Tensor) -> bool:
    """Whether `[rows, heads, slots, dim]` is a contiguous tensor, but for slots left out at the end of each head."""
    _, heads, _, dim = states.shape
    row, head, slot, element = states.stride()
    return element == 1 and slot == dim and head % dim == 0 and row == heads * head


def _whole(states: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor that compact `states` are a part of: the kernel is fast on that layout alone."""
    rows, heads, _, dim = states.shape
    return states.as_strided((rows, heads, states.stride(1) // dim, dim), states.stride())


def _is_bias(mask: torch.Tensor, rows: int, slots: int) -> bool:
    return mask.dtype == torch.float32 and mask.shape == (rows, 1, 1, slots)


# Sums may be reordered, to be taken several at a time; NaN and infinity keep their meaning.
_jit: Any = numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True)


@functools.cache
def _kernel(group: int, dim: int) -> Callable[..., None]:
    """The kernel for `group` queries per key and value head, each of `dim` elements: constants to the compiler.

    Takes queries `[rows, heads, group, dim]`, keys and values `[rows, heads, slots, dim]` of which the first `length`
    slots count, a bias `[rows, length]` or `[0, 0]` for none, the scale, and the output, shaped as the queries.
    """

    @_jit
    def score(q, k, weights):  # type: ignore[no-untyped-def]
        fours = weights.size // 4 * 4  # four slots at a time keep as many sums going at once
        for s in range(0, fours, 4):
            k0, k1, k2, k3 = k[s], k[s + 1], k[s + 2], k[s + 3]
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(dim):
                s0 += q[d] * k0[d]
                s1 += q[d] * k1[d]
                s2 += q[d] * k2[d]
                s3 += q[d] * k3[d]
            weights[s], weights[s + 1], weights[s + 2], weights[s + 3] = s0, s1, s2, s3
        for s in range(fours, weights.size):
            k0, s0 = k[s], np.float32(0)
            for d in range(dim):
                s0 += q[d] * k0[d]
            weights[s] = s0

    @_jit
    def mix(weights, v, scale, out):  # type: ignore[no-untyped-def]
        fours = weights.size // 4 * 4
        for d in range(dim):
            out[d] = 0
        for s in range(0, fours, 4):
            v0, v1, v2, v3 = v[s], v[s + 1], v[s + 2], v[s + 3]
            w0, w1, w2, w3 = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
            for d in range(dim):
                out[d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]
        for s in range(fours, weights.size):
            v0, w0 = v[s], weights[s]
            for d in range(dim):
                out[d] += w0 * v0[d]
        for d in range(dim):
            out[d] *= scale

    @_jit
    def attend(queries, keys, values, length, bias, scale, out):  # type: ignore[no-untyped-def]
        weights, exponents = np.empty(length, np.float32), np.empty(length, np.int32)
        for row in range(keys.shape[0]):
            for head in range(keys.shape[1]):
                k, v = keys[row, head], values[row, head]
                for member in range(group):
                    score(queries[row, head, member], k, weights)
                    for s in range(length):
                        weights[s] *= scale
                    if bias.shape[0] > 0:
                        for s in range(length):
                            weights[s] += bias[row, s]
                    total = _exponentials(weights, exponents)
                    mix(weights, v, np.float32(1) / total, out[row, head, member])

    return attend  # type: ignore[no-any-return]


@_jit
def _exponentials(x, exponents):  # type: ignore[no-untyped-def]
    """Replace `x` by exp(x - max(x)) and return its sum. `exponents` is scratch, int32 of the same size.

    exp(x) = 2^n 2^f with f in [-0.5, 0.5], and 2^f by a polynomial of our own fit, off by 2e-9 at most before rounding.
    """
    powers = exponents.view(np.float32)
    top = x[0]
    for i in range(x.size):
        top = max(top, x[i])
    for i in range(x.size):
        y = max((x[i] - top) * np.float32(1.4426950408889634), np.float32(-126))
        n = np.floor(y + np.float32(0.5))
        f = y - n
        p = np.float32(1.534581087e-4)
        p = p * f + np.float32(1.339993121e-3)
        p = p * f + np.float32(9.618488961e-3)
        p = p * f + np.float32(5.550328777e-2)
        p = p * f + np.float32(2.402264689e-1)
        p = p * f + np.float32(6.931472057e-1)
        exponents[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        x[i] = p * f + np.float32(1)
    total = np.float32(0)
    for i in range(x.size):
        x[i] *= powers[i]
        total += x[i]
    return total

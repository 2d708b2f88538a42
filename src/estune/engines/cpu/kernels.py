"""What a decoder layer does between its matrix products, compiled for one CPU core.

Activations are float32, `[tokens, width]`, C-contiguous, and so is all arithmetic. Weights and caches are of the
model's type: float32, or bfloat16 as its bits in uint16. Widths are multiples of 16. PyTorch would run each of these
passes as five to ten operations over the same memory.

What is called is compiled anew for each combination of types, and for each number that is written out as an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np

from estune.engines.cpu.simd import (
    WIDTH,
    element,
    exp,
    first_of,
    fma,
    largest,
    load,
    maximum,
    products,
    splat,
    store,
    total,
)
from estune.noise.compiled import jit

_inlined: Any = numba.njit(nogil=True, error_model="numpy", inline="always")
ROWS, COLUMNS = (4, 4) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (3, 2)
"""Rows and columns of a product computed at once: as many sums as there are registers for."""
TILE = 4096
"""Elements of a weight that stay in a core's first cache while all tokens pass by."""
AHEAD = 4096
"""How many elements before their use weights are fetched from memory."""
_ZERO = np.float32(0)
_ONE = np.float32(1)
_ABSENT = np.float32(-3e38)  # the score of a slot that is not there


@jit
def embed(ids, x, table):
    """`x = table[ids]`: `ids` `[tokens]`, `table` `[vocabulary, width]`."""
    width = x.shape[1]
    for t in range(ids.size):
        for i in range(0, width, WIDTH):
            store(x, t * width + i, load(table, ids[t] * width + i))


@jit
def add_outer_rows(ids, x, owners, a, b):
    """`x += a[owner, id] * b[owner]`: what each token's owner adds to its row of a table, `x` `[tokens, width]`.

    `ids` and `owners` are `[tokens]`, `a` `[owners, vocabulary]`, `b` `[owners, width]`.
    """
    width = x.shape[1]
    for t in range(ids.size):
        factor = splat(a[owners[t], ids[t]])
        for i in range(0, width, WIDTH):
            at = t * width + i
            store(x, at, load(x, at) + factor * load(b, owners[t] * width + i))


@jit
def add_outer(x, out, owners, a, b, source, target, count):
    """`out += (x . b[owner]) * a[owner]`: what each token's owner adds to a product, in `count` columns of it.

    `x` is `[tokens, width]`, `a` `[owners, columns]`, of which column `source` is that of `out`'s column `target`, `b`
    `[owners, width]`.
    """
    width = x.shape[1]
    for t in range(x.shape[0]):
        sums = splat(_ZERO)
        for i in range(0, width, WIDTH):
            sums = fma(load(x, t * width + i), load(b, owners[t] * width + i), sums)
        factor = total(sums)
        row = out[t, target : target + count]
        noise = a[owners[t], source : source + count]
        for i in range(count):
            row[i] += factor * noise[i]


@jit
def add_low_rank(low, out, b, source, first):
    """`out[:, first:] += low[:, source:] @ b`, over the rows and the columns of `b`, `[rank, columns]`.

    `low` is `[tokens, ranks]`, `out` `[tokens, columns of a product]`.
    """
    rank, columns = b.shape
    for t in range(low.shape[0]):
        for i in range(0, columns, WIDTH):
            at = t * out.shape[1] + first + i
            sums = load(out, at)
            for k in range(rank):
                sums = fma(splat(low[t, source + k]), load(b, k * columns + i), sums)
            store(out, at, sums)


@jit
def normalize(x, out, weight, eps):
    """`out = x / rms(x) * weight`, row by row (RMSNorm, arXiv 1910.07467)."""
    for t in range(x.shape[0]):
        _normalize(x, t * x.shape[1], x.shape[1], weight, eps, out, t * x.shape[1])


@jit
def add_normalize(x, change, out, weight, eps):
    """`x += change`, then as `normalize`."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        for i in range(t * width, (t + 1) * width, WIDTH):
            store(x, i, load(x, i) + load(change, i))
        _normalize(x, t * width, width, weight, eps, out, t * width)


@jit
def _normalize(x, at, width, weight, eps, out, to):
    """Normalize `width` elements of `x` from `at` on into `out` from `to` on, both taken as flat."""
    squares = splat(_ZERO)
    for i in range(0, width, WIDTH):
        value = load(x, at + i)
        squares = fma(value, value, squares)
    scale = splat(_ONE / np.sqrt(total(squares) / np.float32(width) + eps))
    for i in range(0, width, WIDTH):
        store(out, to + i, load(x, at + i) * scale * load(weight, i))


@functools.cache
def product_kernel(rows: int = ROWS, columns: int = COLUMNS) -> Callable[..., None]:
    """`product`, see below, which takes `rows` tokens with `columns` of the weight's rows at once.

    Their numbers change no bit, as every element of `out` is summed up alike: what a token becomes depends neither on
    the tokens beside it, nor on the processor's registers, nor on how the work is shared out.
    """

    @jit
    def product(x, weight, out, first, last):
        """`out = x @ weight.T`, `[tokens, columns]`, in its columns from `first` to `last - 1`.

        `x` is `[tokens, width]`, `weight` `[columns, width]`.
        """
        tokens, width = x.shape
        total = out.shape[1]
        tile = max(1, TILE // (width * columns)) * columns
        for start in range(first, last, tile):
            stop = min(start + tile, last)
            even = stop - (stop - start) % columns
            # The first tokens find the weights in memory, those after them in the cache.
            if tokens >= rows:
                for c in range(start, even, columns):
                    products(x, 0, weight, c * width, width, out, c, total, rows, columns, AHEAD)
            for t in range(rows, tokens - rows + 1, rows):
                for c in range(start, even, columns):
                    products(x, t * width, weight, c * width, width, out, t * total + c, total, rows, columns, 0)
            for t in range(tokens - tokens % rows, tokens):
                for c in range(start, even, columns):
                    products(x, t * width, weight, c * width, width, out, t * total + c, total, 1, columns, AHEAD)
            for c in range(even, stop):
                for t in range(tokens):
                    products(x, t * width, weight, c * width, width, out, t * total + c, total, 1, 1, 0)

    found: Callable[..., None] = product
    return found


@jit
def gate(both, out):
    """`out = silu(g) * u` for `both = [g, u]`, `[tokens, 2 * width]` (SwiGLU, arXiv 2002.05202)."""
    width = out.shape[1]
    zero = splat(_ZERO)
    one = splat(_ONE)
    for t in range(out.shape[0]):
        for i in range(0, width, WIDTH):
            g = load(both, 2 * t * width + i)
            u = load(both, (2 * t + 1) * width + i)
            store(out, t * width + i, g / (one + exp(zero - g)) * u)


@jit
def running_argmax(logits, best, token, first):
    """Update `best` and `token` where `logits` exceed the `best` so far; the earliest token wins a tie.

    `logits` `[rows, width]` are those of tokens `first` to `first + width - 1`; `best` and `token` are `[rows]`.
    """
    width = logits.shape[1]
    for t in range(logits.shape[0]):
        at = t * width
        # The largest of the row; its last vector may overlap with the one before, as the width may be any.
        top = load(logits, at + width - WIDTH)
        for i in range(0, width - WIDTH, WIDTH):
            top = maximum(top, load(logits, at + i))
        highest = largest(top)
        if not highest > best[t]:
            continue
        best[t] = highest
        # Rarely reached: look where it is.
        for i in range(width):
            if element(logits, at + i) == highest:
                token[t] = first + i
                break


@functools.cache
def attention_kernels(group: int, dim: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """`append` and `attend`, see below, for one shape of heads: constants to the compiler, which gains 30%."""

    @jit
    def append(tokens, rows, positions, qkv, cos, sin, norm, eps, keys, values, shared):
        _append(tokens, rows, positions, qkv, group, dim, cos, sin, norm, eps, keys, values, shared)

    @jit
    def attend(qkv, rows, positions, out, cos, sin, norm, eps, keys, values, prefix_keys, prefix_values, shared):
        _attend(
            qkv, rows, positions, out, group, dim, cos, sin, norm, eps, keys, values, prefix_keys, prefix_values, shared
        )

    return append, attend


# Attention with rotary embedding (arXiv 2104.09864). A token's row of `qkv` holds the queries of all heads, then their
# keys, then their values, `dim` elements each, a multiple of 32; a key head serves `group` neighbouring query heads.
# Keys are cached as `[rows, heads, slots / 16, dim, 16]`, values as `[rows, heads, slots, dim]`; the first `shared`
# positions of all rows once, in arrays of their own with one row, where a position is its slot. They are a multiple of
# 16, so that a position has the same place in its vector whatever is shared, and sums are the same. `cos` and `sin` are
# `[positions, dim / 2]`. Queries and keys are normalized with `norm` first, unless it is empty.


@_inlined
def _append(tokens, rows, positions, qkv, group, dim, cos, sin, norm, eps, keys, values, shared):
    """Cache the keys and values of rows `tokens` of `qkv` in slots `positions - shared` of cache rows `rows`."""
    heads, slots = values.shape[1:3]
    rotated = np.empty((1, dim), np.float32)
    stored = np.empty(dim, keys.dtype)
    for n in range(rows.size):
        slot = positions[n] - shared
        for head in range(heads):
            at = tokens[n] * qkv.shape[1] + (heads * group + head) * dim
            _rotate(qkv, at, positions[n], dim, cos, sin, norm, eps, _ONE, rotated, np.int64(0))
            to = ((rows[n] * heads + head) * slots + slot) * dim
            # A slot's key is a column of its block of sixteen slots, its value a row.
            for i in range(0, dim, WIDTH):
                store(stored, i, load(rotated, i))
                store(values, to + i, load(qkv, at + heads * dim + i))
            for i in range(dim):
                keys[rows[n], head, slot // WIDTH, i, slot % WIDTH] = stored[i]


@_inlined
def _attend(
    qkv, rows, positions, out, group, dim, cos, sin, norm, eps, keys, values, prefix_keys, prefix_values, shared
):
    """`out` = each token's attention over positions up to its own of its row, `[tokens, heads * group * dim]`."""
    heads, slots = values.shape[1:3]
    scale = np.float32(1 / np.sqrt(dim))
    q = np.empty((group, dim), np.float32)
    scores = np.empty((group, shared + slots), np.float32)
    for t in range(rows.size):
        own = positions[t] + 1 - shared
        for head in range(heads):
            at = t * qkv.shape[1] + head * group * dim
            # 1. The queries that share this key head, rotated, and scaled by 1 / sqrt(dim).
            for g in range(group):
                _rotate(qkv, at + g * dim, positions[t], dim, cos, sin, norm, eps, scale, q, g * dim)
            cache = (rows[t] * heads + head) * slots * dim
            prefix = head * shared * dim
            # 2. Their scores with all keys: the prefix', then the row's own, which begin at a multiple of sixteen.
            _score(q, group, dim, prefix_keys, prefix, shared, scores, np.int64(0))  # a mere 0 is a kernel of its own
            _score(q, group, dim, keys, cache, own, scores, shared)
            for g in range(group):
                # 3. Softmax, its division left to the end, and the values mixed by it.
                share = g * scores.shape[1]
                factor = _ONE / _soften(scores, share, shared + own)
                to = (t * heads + head) * group * dim + g * dim
                _mix(scores, share, factor, prefix_values, prefix, shared, values, cache, own, dim, out, to)


@jit
def _rotate(qkv, at, position, dim, cos, sin, norm, eps, scale, out, to):
    """Normalize a head's query or key, `dim` elements of `qkv` from `at` on, if it has a norm; rotate and scale it."""
    half = dim // 2
    factor = splat(scale)
    if norm.size:
        _normalize(qkv, at, dim, norm, eps, out, to)
    else:
        for i in range(0, dim, WIDTH):
            store(out, to + i, load(qkv, at + i))
    for i in range(0, half, WIDTH):
        a = load(out, to + i)
        b = load(out, to + half + i)
        c = load(cos, position * half + i)
        s = load(sin, position * half + i)
        store(out, to + i, (a * c - b * s) * factor)
        store(out, to + half + i, (b * c + a * s) * factor)


@jit
def _score(q, group, dim, keys, cache, count, scores, to):
    """`scores[g, to:to + count] = q[g] @ keys[:, :count]`, and absent up to the next sixteen slots."""
    # Sixteen slots at a time, and two sums, so that one multiplication does not wait for the one before.
    for s in range(0, count, WIDTH):
        for g in range(group):
            even = splat(_ZERO)
            odd = splat(_ZERO)
            for d in range(0, dim, 2):
                k = cache + s * dim + d * WIDTH
                even = fma(splat(q[g, d]), load(keys, k), even)
                odd = fma(splat(q[g, d + 1]), load(keys, k + WIDTH), odd)
            store(scores, g * scores.shape[1] + to + s, first_of(even + odd, count - s, splat(_ABSENT)))


@jit
def _soften(scores, at, count):
    """Replace `count` scores from `at` on by exp(score - largest); return their sum."""
    top = splat(_ABSENT)
    sums = splat(_ZERO)
    for s in range(at, at + count, WIDTH):
        top = maximum(top, load(scores, s))
    top = splat(largest(top))
    for s in range(at, at + count, WIDTH):
        weight = exp(load(scores, s) - top)
        store(scores, s, weight)
        sums = sums + weight
    return total(sums)


@jit
def _mix(scores, at, factor, prefix_values, prefix, shared, values, cache, own, dim, out, to):
    """`out[to:to + dim] = factor * scores[at:at + shared + own] @ values`: the prefix' `shared`, then a row's `own`.

    All arrays are taken as flat. Sums run on from the one to the other: where a prefix ends changes no bit.
    """
    # Two vectors of the head and two slots at a time: four sums, none of which waits for another.
    for i in range(0, dim, 2 * WIDTH):
        a = splat(_ZERO)
        b = splat(_ZERO)
        c = splat(_ZERO)
        d = splat(_ZERO)
        for s in range(0, shared, 2):
            one = splat(element(scores, at + s))
            two = splat(element(scores, at + s + 1))
            v = prefix + s * dim + i
            a = fma(one, load(prefix_values, v), a)
            b = fma(one, load(prefix_values, v + WIDTH), b)
            c = fma(two, load(prefix_values, v + dim), c)
            d = fma(two, load(prefix_values, v + dim + WIDTH), d)
        for s in range(0, own - 1, 2):
            one = splat(element(scores, at + shared + s))
            two = splat(element(scores, at + shared + s + 1))
            v = cache + s * dim + i
            a = fma(one, load(values, v), a)
            b = fma(one, load(values, v + WIDTH), b)
            c = fma(two, load(values, v + dim), c)
            d = fma(two, load(values, v + dim + WIDTH), d)
        if own % 2:
            one = splat(element(scores, at + shared + own - 1))
            v = cache + (own - 1) * dim + i
            a = fma(one, load(values, v), a)
            b = fma(one, load(values, v + WIDTH), b)
        store(out, to + i, (a + c) * splat(factor))
        store(out, to + i + WIDTH, (b + d) * splat(factor))

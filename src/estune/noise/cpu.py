"""The two passes over weights on the CPU that use the noise, compiled: perturb and update.

Kernels release the GIL and work on one contiguous run each; the caller spreads runs over threads. A run is elements
`start .. start + array.size - 1` of a checkpoint tensor, in row-major order, or, with `rows`, columns of it
(`rows.py`). float32 weights come as float32 arrays, bfloat16 weights as their bits in uint16 arrays, float16 weights as
float16 arrays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from estune.noise.compiled import jit
from estune.noise.cpu_draw import CHUNK, drawn, random_words
from estune.noise.cpu_types import Weights, narrow, narrow_randomly, stored, widen
from estune.noise.rows import Rows


@jit
def stretch(done, size, width, pitch, skip):
    """What follows the first `done` of `size` elements within a row: its offset from the start, and its length."""
    row = (skip + done) // width
    column = (skip + done) % width
    return row * pitch + column, min(width - column, size - done)


@jit
def _perturb(live, base, seed, tensor, start, sigma, width, pitch, skip):
    words = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    done = np.int64(0)  # for a mere 0 Numba would compile `stretch` once more
    while done < base.size:
        offset, length = stretch(done, base.size, width, pitch, skip)
        noise = drawn(seed, tensor, start + offset, length, words, planes, flat)
        source = base[done : done + noise.size]
        target = live[done : done + noise.size]
        for i in range(noise.size):
            target[i] = narrow(widen(source[i]) + sigma * noise[i], target[i])
        done += noise.size


@jit
def add_change(target, change, tensor, first, decay, rounding_seed, stochastic, words):
    """Add `decay * target + change` to `target`, at most a chunk from position `first` on; `words` is scratch."""
    if stochastic:
        block = first // 4
        n = (first + target.size + 3) // 4 - block
        random_words(rounding_seed, tensor, np.uint64(block), words[0][:n], words[1][:n], words[2][:n], words[3][:n])
        for i in range(target.size):
            old = widen(target[i])
            position = first + i
            word = words[position % 4, position // 4 - block]
            target[i] = narrow_randomly(old + (decay * old + change[i]), target[i], word)
    else:
        for i in range(target.size):
            old = widen(target[i])
            target[i] = narrow(old + (decay * old + change[i]), target[i])


@jit
def _update(base, seeds, coefficients, tensor, start, decay, rounding_seed, stochastic, width, pitch, skip):
    # By chunks of counters: the members' noise is summed up in float32, then added to the base, and rounded once.
    words = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    total = np.empty(4 * CHUNK, np.float32)
    done = np.int64(0)
    while done < base.size:
        offset, length = stretch(done, base.size, width, pitch, skip)
        first = start + offset
        change = total[: min(length, 4 * CHUNK - first % 4)]  # what is drawn at once
        change[:] = np.float32(0)
        for member in range(seeds.size):
            c = coefficients[member]
            noise = drawn(seeds[member], tensor, first, length, words, planes, flat)
            for i in range(noise.size):
                change[i] += c * noise[i]
        target = base[done : done + change.size]
        add_change(target, change, tensor, first, decay, rounding_seed, stochastic, words)
        done += change.size


@jit
def _copy(live, base):
    for i in range(base.size):
        live[i] = narrow(widen(base[i]), live[i])


def perturb(
    live: Weights, base: Weights, seed: int, tensor: int, start: int, sigma: float, rows: Rows | None = None
) -> None:
    """Set `live = base + sigma * noise` over one run: computed in float32, rounded once to live's type.

    Args:
        live: what is written, `[elements]`; it may be `base` itself (the in-place policy).
        base: `[elements]`.
        seed: the member's, 64 bits.
        tensor: 64-bit key of the tensor's noise.
        start: position of the run's first element in its tensor; with `rows`, of their first row's first element.
        sigma: factor of the noise, sign included.
        rows: where the run is columns of its tensor.
    """
    run = (np.uint64(seed), np.uint64(tensor), start, np.float32(sigma))
    _perturb(stored(live), stored(base), *run, *(rows or Rows.one(base.size)))


def copy(live: Weights, base: Weights) -> None:
    """Set `live = base`, both `[elements]`, rounded to live's type."""
    if live.dtype == base.dtype:
        live[:] = base
    else:
        _copy(stored(live), stored(base))


def update(
    base: Weights,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    tensor: int,
    start: int,
    decay: float = 0.0,
    rounding_seed: int | None = None,
    rows: Rows | None = None,
) -> None:
    """Add `decay * base + sum_n coefficients[n] * noise_n` to one run of `base`, members in the given order.

    The sum runs in float32 and is rounded once: to nearest, or, with a `rounding_seed`, stochastically by the noise
    words of that seed (low 16 bits of the element's word).

    Args:
        base: `[elements]`.
        seeds, coefficients: of the members, `[members]` each.
        tensor, start, rows: as `perturb` takes them.
        decay: factor of the base that is added to it.
        rounding_seed: 64 bits; None rounds to nearest.
    """
    rounding = np.uint64(rounding_seed or 0), rounding_seed is not None
    run = (seeds, coefficients, np.uint64(tensor), start, np.float32(decay), *rounding)
    _update(stored(base), *run, *(rows or Rows.one(base.size)))

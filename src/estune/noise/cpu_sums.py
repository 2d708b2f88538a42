"""Sums over weights on the CPU: the fingerprint, and how far two are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from estune.noise.compiled import jit
from estune.noise.cpu import copy, stretch
from estune.noise.cpu_types import Weights
from estune.noise.rows import Rows

SQUARES_BLOCK = 1 << 16  # elements whose squares are one sum
SQUARES_LANES = 1 << 10  # sums side by side that this one is made of

# Fingerprint: constants of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and its finalizer.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX0 = np.uint64(0xBF58476D1CE4E5B9)
_MIX1 = np.uint64(0x94D049BB133111EB)


@jit
def _fingerprint(bits, tensor, start, width, pitch, skip):
    # Of each element SplitMix64's step for its position in the stream that the tensor starts, its bits mixed in.
    total = np.uint64(0)
    done = np.int64(0)
    while done < bits.size:
        offset, length = stretch(done, bits.size, width, pitch, skip)
        part = bits[done : done + length]
        for i in range(length):
            z = tensor + np.uint64(start + offset + i) * _GOLDEN
            z = (z ^ (z >> np.uint64(30)) ^ np.uint64(part[i])) * _MIX0
            z = (z ^ (z >> np.uint64(27))) * _MIX1
            total += z ^ (z >> np.uint64(31))
        done += length
    return total


@jit
def _squares(now, then, sums):
    # Lanes are summed side by side, so that they vectorise, and then folded, half upon half.
    difference = np.empty(SQUARES_LANES, np.float64)
    norm = np.empty(SQUARES_LANES, np.float64)
    for block in range(sums.shape[0]):
        difference[:] = 0
        norm[:] = 0
        end = min((block + 1) * SQUARES_BLOCK, now.size)
        for row in range(block * SQUARES_BLOCK, end, SQUARES_LANES):
            a = now[row : min(row + SQUARES_LANES, end)]
            b = then[row : min(row + SQUARES_LANES, end)]
            for i in range(a.size):
                change = np.float64(np.float32(a[i] - b[i]))
                difference[i] += change * change
                norm[i] += np.float64(b[i]) * np.float64(b[i])
        lanes = SQUARES_LANES // 2
        while lanes:
            for i in range(lanes):
                difference[i] += difference[i + lanes]
                norm[i] += norm[i + lanes]
            lanes //= 2
        sums[block, 0] = difference[0]
        sums[block, 1] = norm[0]


def fingerprint(weights: Weights, tensor: int, start: int, rows: Rows | None = None) -> int:
    """Hash of one run: a sum modulo 2^64 over its elements, so that runs add up in any order and any split.

    Args:
        weights: `[elements]`.
        tensor: 64-bit key of the tensor's name.
        start, rows: as `perturb` takes them.
    """
    bits = weights.view(np.uint32 if weights.dtype == np.float32 else np.uint16)
    return int(_fingerprint(bits, np.uint64(tensor), start, *(rows or Rows.one(weights.size))))


def squares(now: Weights, then: Weights) -> npt.NDArray[np.float64]:
    """Sums of squares of `now - then` and of `then`, one of each for every `SQUARES_BLOCK` elements.

    The order of summation is part of the result, whatever kernel sums. Differences are rounded to float32; their
    squares are exact in float64. Element i of a block is added to lane i mod `SQUARES_LANES`, in order; then lane i + n
    to lane i, for n = half of the lanes, a quarter, and so on to 1.

    Args:
        now: `[elements]`.
        then: `[elements]`, of any type of weights.

    Returns:
        `[blocks, 2]`.
    """
    sums = np.empty((-(-now.size // SQUARES_BLOCK), 2), np.float64)
    _squares(_floats(now), _floats(then), sums)
    return sums


def _floats(weights: Weights) -> npt.NDArray[Any]:
    """Weights in float32: themselves, or a copy."""
    if weights.dtype == np.float32:
        return weights
    found = np.empty(weights.size, np.float32)
    copy(found, weights)
    return found

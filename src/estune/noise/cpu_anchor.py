"""The way back to the base model, compiled for the CPU: one pass over weights, and a checkpoint as it is stored."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from estune.noise.compiled import jit
from estune.noise.cpu_types import Weights, stored, widen


@jit
def _decay(weights, origin, share):
    """By a share of the way."""
    for i in range(weights.size):
        weights[i] += (widen(origin[i]) - weights[i]) * share


@jit
def _step(weights, origin, most):
    """By the way itself, as far as it is no longer than `most`."""
    for i in range(weights.size):
        way = widen(origin[i]) - weights[i]
        weights[i] += min(max(way, -most), most)


def pull(weights: npt.NDArray[np.float32], origin: Weights, share: float, most: float) -> None:
    """Bring weights toward an origin, in place: first by a share of the way, then by the rest of it, up to a length.

    One rounded operation after the other: the same bits as by NumPy or PyTorch.

    Args:
        weights: `[elements]`.
        origin: `[elements]`, float32, float16, or bfloat16 as its bits in uint16.
        share: 0 to 1, of the way.
        most: how far a weight goes at most, in the second step; 0 for none.
    """
    if share:
        _decay(weights, stored(origin), np.float32(share))
    if most:
        _step(weights, stored(origin), np.float32(most))

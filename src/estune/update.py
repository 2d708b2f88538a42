"""An update's kernel, shared by training and replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.strategy import Update

Kernel = Callable[[npt.NDArray[Any], int, int], None]
"""Adds an update to one run of base weights, given (base, tensor id, start)."""


def update_kernel(update: Update, rounding: str) -> Kernel:
    """The kernel of one update, of some KB: it holds the members' seeds and coefficients."""
    from estune.noise import cpu

    pairs = [(m.seed, c) for m, c in zip(update.members, update.coefficients, strict=True) if c != 0.0]
    seeds = np.array([seed for seed, _ in pairs], np.uint64)
    coefficients = np.array([c for _, c in pairs], np.float32)
    rounding_seed = update.rounding_seed if rounding == "stochastic" else None
    if not pairs and update.decay == 0.0:
        return lambda base, tensor, start: None
    return lambda base, tensor, start: cpu.update(base, seeds, coefficients, tensor, start, update.decay, rounding_seed)

"""What kernels of integer weights take: the codes that there are, and updates in steps of the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROUNDING = 0x9E3779B97F4A7C15
"""What a tensor's key is XORed with for the words by which its noise is rounded."""

Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Cuts = npt.NDArray[np.int32]
"""By how many steps codes were not moved, where their type ends, as `cpu_integers.shift` notes it."""


class Levels(NamedTuple):
    """The codes that there are: of the base from `low` to `high`, and of members `reach` steps beyond.

    No code is beyond what the type has, -128 to 127, or -8 to 7.
    """

    low: int
    high: int
    reach: int


class Steps(NamedTuple):
    """Updates one after another, as kernels take them: update i adds members `ends[i - 1]` to `ends[i] - 1`."""

    seeds: npt.NDArray[np.uint64]  # [members]
    coefficients: Floats  # [members], over the update's sigma
    sigmas: Floats  # [updates], times the scale of the tensor's noise
    ends: npt.NDArray[np.int64]  # [updates]

    @classmethod
    def of(cls, updates: Sequence[tuple[Sequence[tuple[int, float]], float]], factor: float = 1.0) -> Steps:
        """Of updates, each with its (seed, coefficient) pairs and its sigma; `factor` is that of a tensor's noise."""
        pairs = [(seed, c / sigma) for members, sigma in updates for seed, c in members]
        return cls(
            np.array([seed for seed, _ in pairs], np.uint64),
            np.array([c for _, c in pairs], np.float32),
            np.array([sigma * factor for _, sigma in updates], np.float32),
            np.cumsum([len(members) for members, _ in updates], dtype=np.int64),
        )

"""The grid of integer weights: each group of neighbours has a scale, and each weight is a code, an integer, times it.

The scale of a group is its largest weight, by absolute value, over the lowest code, sign included: so that weight is on
the grid, and the range, of which the lower half is one code wider, is used in full. Scales never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from estune.noise.integers import Codes, Floats, Levels

LEVELS = {8: Levels(-100, 99, 28), 4: Levels(-7, 6, 1)}
"""Codes by bits. With what members add they fill the type: -128 to 127, and -8 to 7."""
FULL = {8: Levels(-128, 127, 28), 4: Levels(-8, 7, 1)}
"""As `LEVELS`, of a checkpoint's own codes, which fill the type already: members end where it does."""
GroupSize = Literal[16, 32, 64, 128, 256]
"""Elements of a group: so many that groups fill what kernels compute at a time, and half a byte is never left over."""
SCALE_BYTES = 4

_LEAST = np.float32(1e-20)  # a scale is more, so that a group of zeros has one, by which nothing is to be seen of it


@dataclass(frozen=True, slots=True)
class Grid:
    """How weights are integers.

    Attributes:
        bits: of a code, 8 or 4.
        group_size: elements that share a scale.
        carry_steps: updates after which what rounding has cut off is dropped; before, it is carried on.
    """

    bits: int
    group_size: int
    carry_steps: int

    @property
    def levels(self) -> Levels:
        """The codes that there are."""
        return LEVELS[self.bits]

    def bytes(self, elements: int) -> int:
        """Bytes of so many weights, scales included."""
        return elements * self.bits // 8 + elements // self.group_size * SCALE_BYTES

    def scales(self, weights: Floats) -> Floats:
        """The scales, `[groups]`, none of them zero, of weights `[elements]`."""
        groups = weights.reshape(-1, self.group_size)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
        found = largest / np.float32(self.levels.low)
        return np.where(np.abs(found) < _LEAST, _LEAST, found)

    def codes(self, weights: Floats, scales: Floats) -> npt.NDArray[np.int8]:
        """The nearest codes, `[elements]`, of weights `[elements]`: of those that codes stand for, these codes."""
        exact = weights.reshape(-1, self.group_size) / scales[:, None]
        nearest: npt.NDArray[np.int8] = np.rint(exact).clip(self.levels.low, self.levels.high).astype(np.int8)
        return nearest.reshape(-1)

    def pack(self, codes: npt.NDArray[np.int8]) -> Codes:
        """Codes `[elements]` as they are stored."""
        if self.bits == 8:
            return codes
        halves = codes.view(np.uint8) & np.uint8(15)
        return halves[::2] | (halves[1::2] << np.uint8(4))

    def values(self, codes: Codes, scales: Floats) -> Floats:
        """The weights, float32 `[elements]`, that codes stand for, packed or not."""
        from estune.noise.cpu_integers import values

        found = np.empty(scales.size * self.group_size, np.float32)
        values(codes, scales, found)
        return found

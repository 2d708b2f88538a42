"""The grid of integer weights: each group of neighbours has a scale, and each weight is a code, an integer, times it.

The scale of a group is its largest weight, by absolute value, over the lowest code, sign included: so that weight is on
the grid, and the range, of which the lower half is one code wider, is used in full. A checkpoint that is quantised
already has scales and codes, which are taken as they are where they fit. Scales never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt

from estune.noise.integers import Codes, Floats, Levels
from estune.weights.coded import CodedTensor
from estune.weights.tensors import Tensor

LEVELS = {8: Levels(-100, 99, 28), 4: Levels(-7, 6, 1)}
"""Codes by bits. With what members add they fill the type: -128 to 127, and -8 to 7."""
FULL = {8: Levels(-128, 127, 28), 4: Levels(-8, 7, 1)}
"""As `LEVELS`, of a checkpoint's own codes, which fill the type already: members end where it does."""
GroupSize = Literal[16, 32, 64, 128, 256]
"""Elements of a group: so many that groups fill what kernels compute at a time, and half a byte is never left over."""
SCALE_BYTES = 4

_LEAST = np.float32(1e-20)  # a scale is more, so that a group of zeros has one, by which nothing is to be seen of it


class Laid(NamedTuple):
    """Weights on a grid: codes `[elements]`, not packed, and scales `[groups]`."""

    codes: npt.NDArray[np.int8]
    scales: Floats


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

    def has(self, tensor: Tensor) -> TypeGuard[CodedTensor]:
        """Whether a checkpoint's tensor is on this grid, as integers and scales of its own."""
        full = FULL[self.bits]
        return (
            isinstance(tensor, CodedTensor)
            and tensor.group_size % self.group_size == 0
            and full.low <= tensor.low <= tensor.high <= full.high
        )

    def levels_of(self, tensor: Tensor) -> Levels:
        """The codes that there are of a checkpoint's tensor."""
        return (FULL if self.has(tensor) else LEVELS)[self.bits]

    def laid(self, tensor: Tensor, start: int, count: int) -> Laid:
        """Elements `start .. start + count - 1` of a checkpoint's tensor, whole groups: its own codes, or the nearest.

        A scale of zero, which no code can be told by, becomes one of next to nothing, and its codes become zero.
        """
        if not self.has(tensor):
            weights = tensor.read(start, count)
            scales = self.scales(weights)
            return Laid(self.codes(weights, scales, self.levels_of(tensor)), scales)
        wide, scales = tensor.coded(start, count, self.group_size)
        none = np.abs(scales) < _LEAST
        codes: npt.NDArray[np.int8] = np.where(np.repeat(none, self.group_size), 0, wide).astype(np.int8)
        return Laid(codes, np.where(none, _LEAST, scales))

    def bytes(self, elements: int) -> int:
        """Bytes of so many weights, scales included."""
        return elements * self.bits // 8 + elements // self.group_size * SCALE_BYTES

    def scales(self, weights: Floats) -> Floats:
        """The scales, `[groups]`, none of them zero, of weights `[elements]` that have none yet."""
        groups = weights.reshape(-1, self.group_size)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
        found = largest / np.float32(LEVELS[self.bits].low)
        return np.where(np.abs(found) < _LEAST, _LEAST, found)

    def codes(self, weights: Floats, scales: Floats, levels: Levels) -> npt.NDArray[np.int8]:
        """The nearest codes, `[elements]`, of weights `[elements]`: of those that codes stand for, these codes."""
        exact = weights.reshape(-1, self.group_size) / scales[:, None]
        nearest: npt.NDArray[np.int8] = np.rint(exact).clip(levels.low, levels.high).astype(np.int8)
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

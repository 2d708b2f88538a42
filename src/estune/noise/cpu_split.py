"""float32 weights in two halves, compiled for the CPU: bfloat16 weights rounded to nearest, and the lower 16 bits.

Without the lower half a weight is the nearest in bfloat16, ties to even. With it, it is itself again, but for a tie:
what was halfway between two of bfloat16 and was rounded up has to be known. `weights/split.py` keeps that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from estune.noise.compiled import jit
from estune.noise.cpu_types import narrow

Halves = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]

HALFWAY = 0x8000  # the lower half of a tie
TIED_BITS = 0x1FFFF  # the lower half, and the bit above, which tells where a tie is rounded to
TIED_UP = 0x18000

_HALFWAY = np.uint32(HALFWAY)


@jit
def _join(upper, lower, bits):
    for i in range(upper.size):
        low = np.uint32(lower[i])
        high = np.uint32(np.uint32(upper[i]) - np.uint32(low > _HALFWAY))
        bits[i] = np.uint32(high << np.uint32(16)) | low


@jit
def _split(whole, upper, lower):
    tied = 0
    for i in range(whole.size):
        bits = np.float32(whole[i]).view(np.uint32)
        upper[i] = narrow(whole[i], upper[i])
        lower[i] = np.uint16(bits)
        tied += int((bits & np.uint32(TIED_BITS)) == np.uint32(TIED_UP))
    return tied


@jit
def _find(whole, places):
    found = 0
    for i in range(whole.size):
        if (np.float32(whole[i]).view(np.uint32) & np.uint32(TIED_BITS)) == np.uint32(TIED_UP):
            places[found] = i
            found += 1


def join(upper: Halves, lower: Halves) -> Floats:
    """The float32 weights of these halves, `[elements]`, of which no tie is rounded up."""
    whole = np.empty(upper.size, np.float32)
    _join(upper, lower, whole.view(np.uint32))
    return whole


def split(whole: Floats, upper: Halves, lower: Halves) -> npt.NDArray[np.intp]:
    """Write the halves of float32 weights; return the places of ties that are rounded up. All `[elements]`."""
    places = np.empty(_split(whole, upper, lower), np.intp)
    if places.size:
        _find(whole, places)
    return places

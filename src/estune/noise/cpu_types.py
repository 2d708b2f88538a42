"""The types that weights are stored in, as kernels read and write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import overload

from estune.noise.compiled import jit

Weights = npt.NDArray[np.float32] | npt.NDArray[np.uint16] | npt.NDArray[np.float16]

# Inside the kernels, int16 stands for the bits of float16, with which Numba does not calculate on CPUs.
_HALF = np.float32(0.5)
_HALF_SCALE = np.float32(2.0**112)  # from float16's exponent bias, 15, to float32's, 127


@jit
def _from_half(weight):
    """float16's bits as float32."""
    bits = np.uint32(np.uint16(weight))
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    finite = np.float32(np.uint32(magnitude).view(np.float32) * _HALF_SCALE).view(np.uint32)
    special = magnitude | np.uint32(0x7F800000)
    return np.uint32(sign | (special if magnitude >= np.uint32(0x0F800000) else finite)).view(np.float32)


@jit
def _to_half(value):
    """float32 as float16's bits, to nearest, ties to even."""
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    parity = (size >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(size + np.uint32(0xC8000FFF) + parity) >> np.uint32(13)  # exponent less 112, rounded
    # Below 2^-14 the result is a multiple of 2^-24, which is what float32 resolves next to 0.5.
    small = np.float32(size.view(np.float32) + _HALF).view(np.uint32) - np.uint32(0x3F000000)
    large = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    result = np.uint32(small) if size < np.uint32(0x38800000) else normal
    return np.int16(np.uint16(sign | (large if size >= np.uint32(0x47800000) else result)))


def widen(weight):
    """A weight as stored, as float32."""


def narrow(value, like):
    """float32 as the stored type of `like`, to nearest, ties to even."""


def narrow_randomly(value, like, word):
    """float32 as the stored type of `like`, up with a probability equal to the fraction cut off."""


@overload(widen, inline="always")
def _widen_for(weight):
    if weight == types.float32:
        return lambda weight: weight
    if weight == types.int16:
        return lambda weight: _from_half(weight)  # noqa: PLW0108  # Numba compares the arguments' names
    return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)


@overload(narrow, inline="always")
def _narrow_for(value, like):
    if like == types.float32:
        return lambda value, like: value

    def to_bfloat16(value, like):
        bits = np.float32(value).view(np.uint32)
        parity = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + parity) >> np.uint32(16))

    return (lambda value, like: _to_half(value)) if like == types.int16 else to_bfloat16


@overload(narrow_randomly, inline="always")
def _narrow_randomly_for(value, like, word):
    if like == types.float32:
        return lambda value, like, word: value
    if like == types.int16:  # eleven significant bits lose so little that the policy leaves them alone
        return lambda value, like, word: _to_half(value)

    def to_bfloat16(value, like, word):
        bits = np.float32(value).view(np.uint32)
        return np.uint16(np.uint32(bits + (word & np.uint32(0xFFFF))) >> np.uint32(16))

    return to_bfloat16


def stored(weights: Weights) -> npt.NDArray[Any]:
    """Weights as the kernels take them."""
    return weights.view(np.int16) if weights.dtype == np.float16 else weights

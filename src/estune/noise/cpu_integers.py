"""Integer weights on the CPU: the noise rounded onto their grid, and the two passes that use it, shift and advance.

A weight is a code, an integer, times the scale of its group; a group is `group` neighbours in row-major order. A member
moves each code by a whole number of steps: its noise over the scale, rounded up with a probability equal to the part
cut off, so that it is the noise on average. Which way is decided by words of the member's own seed, keyed by another
tensor, so that the steps are as pure a function of (seed, tensor, position) as the noise is. At most `reach` steps are
taken, and none beyond the codes that the type has: where codes of the base do not leave that much room on both sides,
what is cut off is noted, so that a shift back and `give_back` restore each of them.

Codes are int8, `[elements]`, or, packed, two of 4 bits in a byte, uint8 `[elements / 2]`, the first in the lower half.
A run begins and ends with a group, whose size is a multiple of 4 and divides 4,096.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from estune.noise.compiled import jit
from estune.noise.cpu_draw import CHUNK, normals, random_words
from estune.noise.cpu_types import narrow, stored
from estune.noise.integers import ROUNDING, Codes, Cuts, Floats, Levels, Steps

_ELEMENTS = 4 * CHUNK
_ROUNDING = np.uint64(ROUNDING)
_SCALE = np.float32(2.0**-24)
_HALF = np.float32(0.5)
_CUT = 256
"""A cut is the position of a code times this, plus the steps that it was not moved by: fewer than half of it."""
MOST = 2**23
"""Elements of a run that is shifted, so that a cut fits."""


@jit
def _uniforms(seed, tensor, block, words, out):
    """Write numbers in [0, 1) for each element of `out.size // 4` blocks, by the rounding's words."""
    n = out.size // 4
    random_words(seed, tensor ^ _ROUNDING, block, words[0][:n], words[1][:n], words[2][:n], words[3][:n])
    w0 = words[0]
    w1 = words[1]
    w2 = words[2]
    w3 = words[3]
    for j in range(n):
        out[4 * j] = np.float32(np.int32(w0[j] >> np.uint32(8))) * _SCALE
        out[4 * j + 1] = np.float32(np.int32(w1[j] >> np.uint32(8))) * _SCALE
        out[4 * j + 2] = np.float32(np.int32(w2[j] >> np.uint32(8))) * _SCALE
        out[4 * j + 3] = np.float32(np.int32(w3[j] >> np.uint32(8))) * _SCALE


@jit
def _moves(seed, tensor, block, scales, group, sigma, reach, words, planes, uniform, out):
    """Write a member's steps, whole numbers, to `out`."""
    normals(seed, tensor, block, words, planes, out)
    _uniforms(seed, tensor, block, words, uniform)
    for g in range(out.size // group):
        ratio = sigma / scales[g]
        move = out[g * group : (g + 1) * group]
        chance = uniform[g * group : (g + 1) * group]
        for i in range(group):
            x = move[i] * ratio
            size = min(np.abs(x), reach)
            whole = np.float32(np.int32(size))  # vectorises, where floor does not
            whole += np.float32(chance[i] < size - whole)
            move[i] = -whole if x < np.float32(0) else whole


@jit
def _unpack(codes, packed, at, out):
    if packed:
        pairs = codes[at // 2 : (at + out.size) // 2]
        for i in range(pairs.size):
            byte = np.int32(pairs[i])
            out[2 * i] = ((byte & 15) ^ 8) - 8
            out[2 * i + 1] = byte >> 4
    else:
        part = codes[at : at + out.size]
        for i in range(part.size):
            out[i] = part[i]


@jit
def _pack(source, packed, at, codes):
    if packed:
        pairs = codes[at // 2 : (at + source.size) // 2]
        for i in range(pairs.size):
            pairs[i] = np.int8((source[2 * i + 1] << 4) | (source[2 * i] & 15))
    else:
        part = codes[at : at + source.size]
        for i in range(part.size):
            part[i] = np.int8(source[i])


@jit
def _room():
    """What a stretch's noise, steps and codes take while they are computed."""
    return (
        np.empty((4, CHUNK), np.uint32),
        np.empty((5, CHUNK), np.float32),
        np.empty(_ELEMENTS, np.float32),
        np.empty(_ELEMENTS, np.float32),
        np.empty(_ELEMENTS, np.int32),
    )


@jit
def _shift(codes, packed, scales, group, seed, tensor, start, sigma, sign, reach, ends, cuts):
    """Shift the codes and return how many are cut off, written to `cuts`; without `ends` none can be."""
    words, planes, moves, uniform, code = _room()
    count = scales.size * group
    least = np.int32(-8 if packed else -128)
    most = np.int32(7 if packed else 127)
    found = 0
    for at in range(0, count, _ELEMENTS):
        n = min(_ELEMENTS, count - at)
        here = scales[at // group : (at + n) // group]
        block = np.uint64((start + at) // 4)
        _moves(seed, tensor, block, here, group, sigma, reach, words, planes, uniform[:n], moves[:n])
        _unpack(codes, packed, at, code[:n])
        for i in range(n):
            code[i] += sign * np.int32(moves[i])
        if ends:
            for i in range(n):
                wanted = code[i]
                code[i] = min(max(wanted, least), most)
                if wanted != code[i]:
                    cuts[found] = (at + i) * _CUT + (wanted - code[i])
                    found += 1
        _pack(code[:n], packed, at, codes)
    return found


@jit
def _give_back(codes, packed, cuts):
    code = np.empty(2, np.int32)
    for cut in cuts:
        place = (np.int64(cut) + _CUT // 2) // _CUT
        steps = np.int32(cut - place * _CUT)
        if packed:
            at = place - place % 2
            _unpack(codes, packed, at, code)
            code[place - at] += steps
            _pack(code, packed, at, codes)
        else:
            codes[place] += steps


@jit
def _advance(
    codes, packed, scales, group, error, fresh, seeds, coefficients, sigmas, ends, tensor, start, low, high, reach,
    dither, dithered,
):  # fmt: skip
    words, planes, moves, uniform, code = _room()
    total = np.empty(_ELEMENTS, np.float32)
    scratch = np.empty(_ELEMENTS, np.float32)
    count = scales.size * group
    for at in range(0, count, _ELEMENTS):
        n = min(_ELEMENTS, count - at)
        here = scales[at // group : (at + n) // group]
        block = np.uint64((start + at) // 4)
        left = error[at : at + n] if error.size else scratch[:n]
        if fresh:
            left[:] = np.float32(0)
            if dithered:
                _uniforms(dither, tensor, block, words, left)
                for i in range(n):
                    left[i] -= _HALF
        first = 0
        for step in range(ends.size):
            total[:n] = np.float32(0)
            for member in range(first, ends[step]):
                c = coefficients[member]
                seed = seeds[member]
                _moves(seed, tensor, block, here, group, sigmas[step], reach, words, planes, uniform[:n], moves[:n])
                for i in range(n):
                    total[i] += c * moves[i]
            first = ends[step]
            for i in range(n):
                wanted = left[i] + total[i]
                moves[i] = np.floor(wanted + _HALF)
                left[i] = wanted - moves[i]
        _unpack(codes, packed, at, code[:n])
        for i in range(n):
            code[i] = np.int32(min(max(np.float32(code[i]) + moves[i], np.float32(low)), np.float32(high)))
        _pack(code[:n], packed, at, codes)


@jit
def _values(codes, packed, scales, group, out):
    code = np.empty(_ELEMENTS, np.int32)
    count = scales.size * group
    for at in range(0, count, _ELEMENTS):
        n = min(_ELEMENTS, count - at)
        _unpack(codes, packed, at, code[:n])
        for g in range(n // group):
            scale = scales[at // group + g]
            source = code[g * group : (g + 1) * group]
            target = out[at + g * group : at + (g + 1) * group]
            for i in range(group):
                target[i] = narrow(np.float32(source[i]) * scale, target[i])


def shift(
    codes: Codes, scales: Floats, seed: int, tensor: int, start: int, sigma: float, sign: int, levels: Levels
) -> Cuts:
    """Move the codes of one run by `sign` times the steps of a member, in place; the other sign takes it back.

    No code goes beyond those that its type has. What that cuts off is for `give_back`, after the way back.

    Args:
        codes: `[elements]`, or packed.
        scales: of the run's groups, `[groups]`, none of them zero.
        seed, tensor, start: as `cpu.perturb` takes them.
        sigma: factor of the noise, without sign.
        sign: 1 or -1.
        levels: what codes there are.

    Returns:
        What was cut off, `[codes that would have gone beyond]`.
    """
    held, packed, group = _layout(codes, scales)
    assert scales.size * group <= MOST
    cuts = np.empty(scales.size * group, np.int32)  # takes memory only as far as it is written
    run = (held, packed, scales, group, np.uint64(seed), np.uint64(tensor), start)
    half = 8 if packed else 128
    ends = levels.low - levels.reach < -half or levels.high + levels.reach >= half
    count = _shift(*run, np.float32(sigma), sign, np.float32(levels.reach), ends, cuts)
    return cuts[:count].copy()


def give_back(codes: Codes, cuts: Cuts) -> None:
    """Move codes that were shifted there and back by what was cut off on the way there, in place."""
    if cuts.size:
        _give_back(codes.view(np.int8), codes.dtype == np.uint8, cuts)


def advance(
    codes: Codes,
    scales: Floats,
    steps: Steps,
    tensor: int,
    start: int,
    levels: Levels,
    *,
    error: Floats | None = None,
    fresh: bool = True,
    dither_seed: int | None = None,
) -> None:
    """Make the last of some updates to the codes of one run, in place; the others tell what error they have left.

    An update wants sum_n (coefficients[n] / sigma) * steps_n, in steps of the grid, and the error on top. It gets the
    nearest whole number, halves upward; the difference is the next update's error. All is float32, summed in order.
    The error does not depend on the codes. They end at `levels.low` and `levels.high`, where what goes beyond is lost.

    Args:
        codes, scales, tensor, start, levels: as `shift` takes them.
        steps: the updates.
        error: `[elements]`, to be kept from call to call; None makes it in passing, for which `fresh` has to be True.
        fresh: the first update has no error yet.
        dither_seed: 64 bits. Then that first error is random, from -1/2 to 1/2, so that codes are on average what the
            updates want; None makes it zero.
    """
    held, packed, group = _layout(codes, scales)
    kept = np.empty(0, np.float32) if error is None else error
    dither = np.uint64(dither_seed or 0), dither_seed is not None
    bounds = levels.low, levels.high, np.float32(levels.reach)
    _advance(held, packed, scales, group, kept, fresh, *steps, np.uint64(tensor), start, *bounds, *dither)


def values(codes: Codes, scales: Floats, out: Any) -> None:
    """Write the weights that codes stand for, code times scale, rounded to float32 and then to the type of `out`.

    Args:
        codes, scales: as `shift` takes them.
        out: `[elements]`, float32, or bfloat16 as its bits in uint16, or float16.
    """
    held, packed, group = _layout(codes, scales)
    _values(held, packed, scales, group, stored(out))


def _layout(codes: Codes, scales: Floats) -> tuple[npt.NDArray[np.int8], bool, int]:
    """Codes as kernels take them, whether they are packed, and the elements of a group."""
    packed = codes.dtype == np.uint8
    elements = codes.size * (2 if packed else 1)
    return codes.view(np.int8), packed, elements // scales.size

"""Perturbing weights in place and taking it back to the bit, compiled for the CPU.

Subtracting the noise that was added gives back most weights. For the others there are patches of two bytes, which say
where they are and how far off the subtraction will be; they are made while the noise is added, as both results are
known then.

Weights in bfloat16 can be the upper halves of float32 weights, of which the lower halves lie beside them and never
change while members come and go (`weights/split.py`). A member then overwrites the upper half with the perturbed
weight, and what takes it back is found from that, the noise and the lower half: numbers with one lower half are as far
apart as the perturbed weight is uncertain, so that as a rule one alone fits.

The patches of a run are one stream of 16-bit words. For every `PATCHED` weights or less there is a word that counts
their patches, and then these: the weight's place among them, shifted by 5, and what is to be added to the bits that
subtracting gives, -15 to 15, plus 16. If that is not enough, as for a weight far smaller than its noise, the low five
bits are 0, and two words with the weight's own bits follow, the low half first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import overload

from estune.noise import low_rank
from estune.noise.compiled import jit
from estune.noise.cpu import stretch
from estune.noise.cpu_draw import CHUNK, drawn
from estune.noise.cpu_split import HALFWAY, Halves
from estune.noise.cpu_types import Weights, narrow, stored, widen
from estune.noise.rows import Rows

PATCHED = 2048  # weights that a place of 11 bits tells apart
FURTHEST = 15  # of the bits, that a patch's own word tells
PLACE_SHIFT = 5
GROUP = 8  # weights that are looked at together
ROOM = 1 / 32  # more than the patches seen so far let expect

_BIAS = np.int32(FURTHEST + 1)
_FAR = np.uint8(1 << PLACE_SHIFT)  # a code of which the low bits are 0
_ANY_FAR = np.uint64(0x2020202020202020)
_CODE = np.uint16((1 << PLACE_SHIFT) - 1)
_HALFWAY = np.uint32(HALFWAY)


def _bits(weight):
    """A weight's bits as an int32."""


def _from_bits(bits, like):
    """The weight, in the stored type of `like`, of these bits."""


def _part(lower, first, end):
    """The lower halves of some weights; None where there are none."""


def _whole(weights, lower, i):
    """Weight i in float32, with its lower half if it has one."""


def _guess(perturbed, change, weights, lower, i):
    """What weight i was stored as, as far as the perturbed weight, the change and a lower half tell."""


@overload(_bits, inline="always")
def _bits_for(weight):
    if weight == types.float32:
        return lambda weight: np.float32(weight).view(np.int32)
    return lambda weight: np.int32(np.uint16(weight))


@overload(_from_bits, inline="always")
def _from_bits_for(bits, like):
    if like == types.float32:
        return lambda bits, like: np.int32(bits).view(np.float32)
    if like == types.int16:
        return lambda bits, like: np.int16(bits)
    return lambda bits, like: np.uint16(bits)


@overload(_part, inline="always")
def _part_for(lower, first, end):
    if lower == types.none:
        return lambda lower, first, end: None
    return lambda lower, first, end: lower[first:end]


@overload(_whole, inline="always")
def _whole_for(weights, lower, i):
    if lower == types.none:
        return lambda weights, lower, i: widen(weights[i])

    def joined(weights, lower, i):
        low = np.uint32(lower[i])
        high = np.uint32(np.uint32(weights[i]) - np.uint32(low > _HALFWAY))
        return np.uint32(np.uint32(high << np.uint32(16)) | low).view(np.float32)

    return joined


@overload(_guess, inline="always")
def _guess_for(perturbed, change, weights, lower, i):
    if lower == types.none:
        return lambda perturbed, change, weights, lower, i: narrow(widen(perturbed) - change, weights[i])

    def nearest(perturbed, change, weights, lower, i):
        low = np.uint32(lower[i])
        bits = np.float32(widen(perturbed) - change).view(np.uint32)
        high = np.uint32(np.uint32(bits - low) + _HALFWAY) >> np.uint32(16)
        return np.uint16(high + np.uint32(low > _HALFWAY))

    return nearest


@jit
def _add(weights, lower, noise, sigma, perturbed, codes):
    """Write the perturbed weights and, of those that subtracting would not give back, a code; return the words needed.

    A code is the low five bits of a patch's word, or `_FAR`; 0 is none.
    """
    for i in range(noise.size):
        change = sigma * noise[i]
        new = narrow(_whole(weights, lower, i) + change, weights[i])
        back = _guess(new, change, weights, lower, i)
        off = np.int32(_bits(weights[i]) - _bits(back))
        near = np.uint32(off + FURTHEST) <= np.uint32(2 * FURTHEST)
        code = np.uint8(off + _BIAS) if near else _FAR
        perturbed[i] = new
        codes[i] = code if off != 0 else np.uint8(0)
    needed = (noise.size + PATCHED - 1) // PATCHED
    for i in range(noise.size):
        needed += np.int32(codes[i] != 0) + np.int32(2) * np.int32(codes[i] == _FAR)
    return needed


@jit
def _write(codes, weights, words, used):
    """Write the patches of at most `PATCHED` weights, and a word of no meaning behind; return the words used then."""
    groups = codes.view(np.uint64)
    count = used
    used += 1
    more = 0
    for group in range((weights.size + GROUP - 1) // GROUP):
        if groups[group] == 0:  # most are
            continue
        far = (groups[group] & _ANY_FAR) != 0
        for i in range(group * GROUP, group * GROUP + GROUP):
            words[used] = np.uint16((i << PLACE_SHIFT) | (codes[i] & _CODE))
            used += np.int64(codes[i] != 0)  # instead of a branch that no processor could foresee
            if far and codes[i] == _FAR:
                bits = np.uint32(_bits(weights[i]))
                words[used] = np.uint16(bits)
                words[used + 1] = np.uint16(bits >> np.uint32(16))
                used += 2
                more += 2
    words[count] = np.uint16(used - count - 1 - more)
    return used


@jit
def _patch(weights, words, used):
    """Patch at most `PATCHED` weights by the words from `used` on; return where the next ones begin."""
    count = words[used]
    used += 1
    for _ in range(count):
        i = np.int64(words[used] >> np.uint16(PLACE_SHIFT))
        code = np.int32(words[used] & _CODE)
        used += 1
        if code:
            weights[i] = _from_bits(_bits(weights[i]) + code - _BIAS, weights[i])
        else:
            bits = np.uint32(words[used]) | (np.uint32(words[used + 1]) << np.uint32(16))
            weights[i] = _from_bits(np.int32(bits), weights[i])
            used += 2
    return used


@jit
def _drawn(seed, tensor, a, b, top, first, length, scratch, planes, flat):
    """The noise of at most `length` elements from `first` on, in `flat`: products of `a` and `b`, or drawn for each.

    `a` begins with row `top`, and `b` is empty where each element has noise of its own.
    """
    if b.size:
        columns = b.shape[1]
        found = flat[: min(length, flat.size)]
        done = 0
        row = first // columns - top
        column = first % columns
        while done < found.size:
            n = min(columns - column, found.size - done)
            low_rank.multiply(found[done : done + n], a, b, row, column)
            done += n
            row += 1
            column = 0
        return found
    return drawn(seed, tensor, first, length, scratch, planes, flat)


@jit
def _perturb(live, lower, seed, tensor, a, b, top, start, sigma, width, pitch, skip, done, used, words):
    """Perturb from element `done` on, with `used` words written, until all is done or the next words have no room.

    Returns:
        How far it came, the words used, and how many more the next weights need, 0 if all is done.
    """
    scratch = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    perturbed = np.empty(4 * CHUNK, live.dtype)
    codes = np.empty(4 * CHUNK, np.uint8)
    while done < live.size:
        offset, length = stretch(done, live.size, width, pitch, skip)
        first = start + offset
        noise = _drawn(seed, tensor, a, b, top, first, length, scratch, planes, flat)
        weights = live[done : done + noise.size]
        needed = _add(weights, _part(lower, done, done + noise.size), noise, sigma, perturbed, codes) + 1
        if used + needed > words.size:
            return done, used, needed
        codes[noise.size : noise.size + GROUP] = 0
        for i in range(0, noise.size, PATCHED):
            used = _write(codes[i : i + PATCHED], weights[i : i + PATCHED], words, used)
        for i in range(noise.size):  # not `weights[:] = ...`: what that raises takes Numba seconds to compile
            weights[i] = perturbed[i]
        done += noise.size
    return done, used, 0


@jit
def _restore(live, lower, seed, tensor, a, b, top, start, sigma, width, pitch, skip, words):
    scratch = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    restored = np.empty(4 * CHUNK, live.dtype)  # a loop that might read what it writes would not vectorise
    done = np.int64(0)  # for a mere 0 Numba would compile `stretch` once more, and `_patch`
    used = np.int64(0)
    while done < live.size:
        offset, length = stretch(done, live.size, width, pitch, skip)
        first = start + offset
        noise = _drawn(seed, tensor, a, b, top, first, length, scratch, planes, flat)
        weights = live[done : done + noise.size]
        low = _part(lower, done, done + noise.size)
        for i in range(noise.size):
            restored[i] = _guess(weights[i], sigma * noise[i], weights, low, i)
        for i in range(0, noise.size, PATCHED):
            used = _patch(restored[i : i + PATCHED], words, used)
        for i in range(noise.size):
            weights[i] = restored[i]
        done += noise.size


class Patches:
    """The patches of one run, empty until it is perturbed."""

    def __init__(self) -> None:
        self.words: npt.NDArray[np.uint16] = np.empty(0, np.uint16)

    @property
    def nbytes(self) -> int:
        """Bytes that they have taken: the most that they needed so far, and some more."""
        return self.words.nbytes


def perturb(
    live: Weights,
    patches: Patches,
    seed: int,
    tensor: int,
    start: int,
    sigma: float,
    rows: Rows | None = None,
    lower: Halves | None = None,
    columns: int = 0,
    rank: int = 1,
) -> None:
    """Add `sigma * noise(seed)` to one run, as `cpu.perturb` in place does, and note what `restore` needs.

    Args:
        live: the run, `[elements]`.
        patches: of this run; those that it has are forgotten.
        seed, tensor, start, sigma, rows: as `cpu.perturb` takes them.
        lower: the lower halves, `[elements]`, of float32 weights that bfloat16 ones in `live` are the upper halves of,
            one more where the lower half is more than 0x8000; the perturbed weights are then these, rounded once.
        columns: of a matrix whose noise is of low rank (`low_rank.py`); 0 where each element has noise of its own.
        rank: of that noise.
    """
    weights = stored(live)
    key = _key(live, seed, tensor, start, sigma, rows, columns, rank)
    done, used, needed = _perturb(weights, lower, *key, 0, 0, patches.words)
    while needed:
        # Room for all, if the rest is like the beginning; where that was too little, it is asked for again.
        expected = (used + needed) * live.size // min(done + 4 * CHUNK, live.size)
        grown = np.empty(int(expected * (1 + ROOM)) + needed, np.uint16)
        grown[:used] = patches.words[:used]
        patches.words = grown
        done, used, needed = _perturb(weights, lower, *key, done, used, grown)


def restore(
    live: Weights,
    patches: Patches,
    seed: int,
    tensor: int,
    start: int,
    sigma: float,
    rows: Rows | None = None,
    lower: Halves | None = None,
    columns: int = 0,
    rank: int = 1,
) -> None:
    """Take back the `perturb` of these arguments: every weight of the run has the bits that it had before."""
    _restore(stored(live), lower, *_key(live, seed, tensor, start, sigma, rows, columns, rank), patches.words)


def _key(
    live: Weights, seed: int, tensor: int, start: int, sigma: float, rows: Rows | None, columns: int, rank: int
) -> tuple[Any, ...]:
    """The arguments as kernels take them."""
    width, pitch, skip = rows or Rows.one(live.size)
    top = 0
    drawn = low_rank.Factors(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
    if columns and live.size:
        first, last = (start + i // width * pitch + i % width for i in (skip, skip + live.size - 1))
        top = first // columns
        drawn = low_rank.factors(seed, tensor, columns, rank, top, last // columns + 1 - top)
    return (np.uint64(seed), np.uint64(tensor), *drawn, top, start, np.float32(sigma), width, pitch, skip)

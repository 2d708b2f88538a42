"""The noise, compiled for the CPU, and the two passes that use it: perturb and update.

Bit for bit the function of `reference.py`. Noise lives only in a scratch of 32 KiB per call: words of a chunk of
counters first, then the transform, in loops split so that each vectorises (selects instead of branches, 32-bit
integers). Kernels release the GIL and work on one contiguous run each; the caller spreads runs over threads.

A run is elements `start .. start + array.size - 1` of a checkpoint tensor, in row-major order, or, with `rows`, columns
of it (`rows.py`). float32 weights come as float32 arrays, bfloat16 weights as their bits in uint16 arrays, float16
weights as float16 arrays.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import overload

from estune.noise import reference as ref
from estune.noise.rows import Rows

CHUNK = 1024  # counters; the scratch for four words and four normals of each then fits the first-level cache

SQUARES_BLOCK = 1 << 16  # elements whose squares are one sum
SQUARES_LANES = 1 << 10  # sums side by side that this one is made of

_M0 = np.uint64(ref.PHILOX_M0)
_M1 = np.uint64(ref.PHILOX_M1)
_W0 = np.uint32(ref.PHILOX_W0)
_W1 = np.uint32(ref.PHILOX_W1)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (np.float32(c) for c in ref.LOG)
_S0, _S1, _S2 = (np.float32(c) for c in ref.SIN)
_C0, _C1, _C2 = (np.float32(c) for c in ref.COS)
_SQRT_HALF = np.float32(ref.SQRT_HALF)
_HALF_PI = np.float32(ref.HALF_PI)
_LN2_LOW = np.float32(ref.LN2_LOW)
_LN2_HIGH = np.float32(ref.LN2_HIGH)
_SCALE = np.float32(ref.TWO_POW_MINUS_24)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_MINUS_TWO = np.float32(-2)

# Fingerprint: constants of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) and its finalizer.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX0 = np.uint64(0xBF58476D1CE4E5B9)
_MIX1 = np.uint64(0x94D049BB133111EB)

Weights = npt.NDArray[np.float32] | npt.NDArray[np.uint16] | npt.NDArray[np.float16]

# Inside the kernels, int16 stands for the bits of float16, with which Numba does not calculate on CPUs.
_HALF_SCALE = np.float32(2.0**112)  # from float16's exponent bias, 15, to float32's, 127

# No fastmath: contraction to fused multiply-add or reassociation would change the bits.
jit: Any = numba.njit(nogil=True, cache=True, error_model="numpy")


@jit
def random_words(seed, tensor, block, w0, w1, w2, w3):
    """Write the words of blocks from `block` on, one of each block to each of `w0` to `w3`, `[blocks]`."""
    # Philox4x32-10: the counter is (block, tensor), 64 bits each, and the key is the seed.
    t0 = np.uint32(tensor)
    t1 = np.uint32(tensor >> np.uint64(32))
    seed0 = np.uint32(seed)
    seed1 = np.uint32(seed >> np.uint64(32))
    for j in range(w0.size):
        counter = block + np.uint64(j)
        c0 = np.uint32(counter)
        c1 = np.uint32(counter >> np.uint64(32))
        c2 = t0
        c3 = t1
        k0 = seed0
        k1 = seed1
        # Ten rounds: two products, their high halves mixed with the other words and the key; then the key moves on.
        for _ in range(10):
            p0 = np.uint64(c0) * _M0
            p1 = np.uint64(c2) * _M1
            c0 = np.uint32(np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0)
            c2 = np.uint32(np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1)
            c1 = np.uint32(p1)
            c3 = np.uint32(p0)
            k0 = np.uint32(k0 + _W0)
            k1 = np.uint32(k1 + _W1)
        w0[j], w1[j], w2[j], w3[j] = c0, c1, c2, c3


@jit
def box_muller(a, b, mantissa, n0, n1):
    """Turn words `a`, `b` into normals `n0`, `n1`; `mantissa` is scratch. All of one length."""
    bits = mantissa.view(np.uint32)
    exponent = n1.view(np.int32)
    # 1. u in (0, 1] from the upper 24 bits of a.
    for j in range(a.size):
        mantissa[j] = np.float32(np.int32(a[j] >> np.uint32(8)) + np.int32(1)) * _SCALE
    # 2. u = m * 2^e with m in [0.5, 1).
    for j in range(a.size):
        exponent[j] = np.int32(bits[j] >> np.uint32(23)) - np.int32(126)
        bits[j] = (bits[j] & np.uint32(0x7FFFFF)) | np.uint32(0x3F000000)
    # 3. The radius, sqrt(-2 ln u): Cephes' logf, whose polynomial wants m in [sqrt(0.5), sqrt(2)).
    for j in range(a.size):
        m = mantissa[j]
        small = m < _SQRT_HALF
        e = np.float32(np.int32(exponent[j] - np.int32(small)))
        m = np.float32((m + m if small else m) - _ONE)
        z = m * m
        y = _L0 * m + _L1
        y = y * m + _L2
        y = y * m + _L3
        y = y * m + _L4
        y = y * m + _L5
        y = y * m + _L6
        y = y * m + _L7
        y = y * m + _L8
        y = (y * m) * z
        y = y + e * _LN2_LOW
        y = y - _HALF * z
        n0[j] = np.sqrt(_MINUS_TWO * ((m + y) + e * _LN2_HIGH))
    # 4. The angle: two bits of b name its quadrant, 24 its place there, from -pi/4 to pi/4 for Cephes' sinf and cosf.
    for j in range(a.size):
        q = b[j] >> np.uint32(30)
        t = np.float32(np.int32((b[j] >> np.uint32(6)) & np.uint32(0xFFFFFF))) * _SCALE - _HALF
        th = t * _HALF_PI
        w = th * th
        s = _S0 * w + _S1
        s = s * w + _S2
        s = (s * w) * th + th
        c = _C0 * w + _C1
        c = c * w + _C2
        c = (c * w) * w - _HALF * w + _ONE
        odd = (q & np.uint32(1)) != np.uint32(0)
        turned = (q & np.uint32(2)) != np.uint32(0)
        cos = -s if odd else c
        sin = c if odd else s
        r = n0[j]
        n0[j] = r * (-cos if turned else cos)
        n1[j] = r * (-sin if turned else sin)


@jit
def normals(seed, tensor, block, words, planes, flat):
    """Write the normals of `flat.size // 4` blocks to `flat`; `words` (4, CHUNK), `planes` (5, CHUNK) are scratch."""
    n = flat.size // 4
    random_words(seed, tensor, block, words[0][:n], words[1][:n], words[2][:n], words[3][:n])
    for i in range(0, 4, 2):  # a loop, as two calls are twice the code, in every kernel that this becomes part of
        box_muller(words[i][:n], words[i + 1][:n], planes[4][:n], planes[i][:n], planes[i + 1][:n])
    p0 = planes[0]
    p1 = planes[1]
    p2 = planes[2]
    p3 = planes[3]
    for j in range(n):
        flat[4 * j], flat[4 * j + 1], flat[4 * j + 2], flat[4 * j + 3] = p0[j], p1[j], p2[j], p3[j]


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


def _narrow_randomly(value, like, word):
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


@overload(_narrow_randomly, inline="always")
def _narrow_randomly_for(value, like, word):
    if like == types.float32:
        return lambda value, like, word: value
    if like == types.int16:  # eleven significant bits lose so little that the policy leaves them alone
        return lambda value, like, word: _to_half(value)

    def to_bfloat16(value, like, word):
        bits = np.float32(value).view(np.uint32)
        return np.uint16(np.uint32(bits + (word & np.uint32(0xFFFF))) >> np.uint32(16))

    return to_bfloat16


@jit
def drawn(seed, tensor, first, length, words, planes, flat):
    """The noise of at most `length` elements from position `first` on, as far as a chunk goes: a part of `flat`.

    `words` (4, CHUNK), `planes` (5, CHUNK) and `flat` (4 * CHUNK) are scratch.
    """
    block = first // 4
    n = min((first + length + 3) // 4 - block, CHUNK)
    normals(seed, tensor, np.uint64(block), words, planes, flat[: 4 * n])
    return flat[first - 4 * block : min(first + length - 4 * block, 4 * n)]


@jit
def fill(out, seed, tensor, start):
    """Write the noise of as many elements from `start` on to `out`."""
    words = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    done = np.int64(0)
    while done < out.size:
        noise = drawn(seed, tensor, start + done, out.size - done, words, planes, flat)
        for i in range(noise.size):  # not by slices: what their assignment raises takes Numba seconds to compile
            out[done + i] = noise[i]
        done += noise.size


@jit
def stretch(done, size, width, pitch, skip):
    """What follows the first `done` of `size` elements within a row: its offset from the start, and its length."""
    row = (skip + done) // width
    column = (skip + done) % width
    return row * pitch + column, min(width - column, size - done)


@jit
def _perturb(live, base, seed, tensor, start, sigma, width, pitch, skip):
    words = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    done = np.int64(0)  # for a mere 0 Numba would compile `stretch` once more
    while done < base.size:
        offset, length = stretch(done, base.size, width, pitch, skip)
        noise = drawn(seed, tensor, start + offset, length, words, planes, flat)
        source = base[done : done + noise.size]
        target = live[done : done + noise.size]
        for i in range(noise.size):
            target[i] = narrow(widen(source[i]) + sigma * noise[i], target[i])
        done += noise.size


@jit
def add_change(target, change, tensor, first, decay, rounding_seed, stochastic, words):
    """Add `decay * target + change` to `target`, at most a chunk from position `first` on; `words` is scratch."""
    if stochastic:
        block = first // 4
        n = (first + target.size + 3) // 4 - block
        random_words(rounding_seed, tensor, np.uint64(block), words[0][:n], words[1][:n], words[2][:n], words[3][:n])
        for i in range(target.size):
            old = widen(target[i])
            position = first + i
            word = words[position % 4, position // 4 - block]
            target[i] = _narrow_randomly(old + (decay * old + change[i]), target[i], word)
    else:
        for i in range(target.size):
            old = widen(target[i])
            target[i] = narrow(old + (decay * old + change[i]), target[i])


@jit
def _update(base, seeds, coefficients, tensor, start, decay, rounding_seed, stochastic, width, pitch, skip):
    # By chunks of counters: the members' noise is summed up in float32, then added to the base, and rounded once.
    words = np.empty((4, CHUNK), np.uint32)
    planes = np.empty((5, CHUNK), np.float32)
    flat = np.empty(4 * CHUNK, np.float32)
    total = np.empty(4 * CHUNK, np.float32)
    done = np.int64(0)
    while done < base.size:
        offset, length = stretch(done, base.size, width, pitch, skip)
        first = start + offset
        change = total[: min(length, 4 * CHUNK - first % 4)]  # what is drawn at once
        change[:] = np.float32(0)
        for member in range(seeds.size):
            c = coefficients[member]
            noise = drawn(seeds[member], tensor, first, length, words, planes, flat)
            for i in range(noise.size):
                change[i] += c * noise[i]
        target = base[done : done + change.size]
        add_change(target, change, tensor, first, decay, rounding_seed, stochastic, words)
        done += change.size


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


@jit
def _copy(live, base):
    for i in range(base.size):
        live[i] = narrow(widen(base[i]), live[i])


def normal(seed: int, tensor: int, start: int, count: int) -> npt.NDArray[np.float32]:
    """Noise of elements `start .. start + count - 1` of the tensor whose 64-bit key is `tensor`, `[count]`."""
    out = np.empty(count, np.float32)
    fill(out, np.uint64(seed), np.uint64(tensor), start)
    return out


def perturb(
    live: Weights, base: Weights, seed: int, tensor: int, start: int, sigma: float, rows: Rows | None = None
) -> None:
    """Set `live = base + sigma * noise` over one run: computed in float32, rounded once to live's type.

    Args:
        live: what is written, `[elements]`; it may be `base` itself (the in-place policy).
        base: `[elements]`.
        seed: the member's, 64 bits.
        tensor: 64-bit key of the tensor's noise.
        start: position of the run's first element in its tensor; with `rows`, of their first row's first element.
        sigma: factor of the noise, sign included.
        rows: where the run is columns of its tensor.
    """
    run = (np.uint64(seed), np.uint64(tensor), start, np.float32(sigma))
    _perturb(stored(live), stored(base), *run, *(rows or Rows.one(base.size)))


def copy(live: Weights, base: Weights) -> None:
    """Set `live = base`, both `[elements]`, rounded to live's type."""
    if live.dtype == base.dtype:
        live[:] = base
    else:
        _copy(stored(live), stored(base))


def update(
    base: Weights,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    tensor: int,
    start: int,
    decay: float = 0.0,
    rounding_seed: int | None = None,
    rows: Rows | None = None,
) -> None:
    """Add `decay * base + sum_n coefficients[n] * noise_n` to one run of `base`, members in the given order.

    The sum runs in float32 and is rounded once: to nearest, or, with a `rounding_seed`, stochastically by the noise
    words of that seed (low 16 bits of the element's word).

    Args:
        base: `[elements]`.
        seeds, coefficients: of the members, `[members]` each.
        tensor, start, rows: as `perturb` takes them.
        decay: factor of the base that is added to it.
        rounding_seed: 64 bits; None rounds to nearest.
    """
    rounding = np.uint64(rounding_seed or 0), rounding_seed is not None
    run = (seeds, coefficients, np.uint64(tensor), start, np.float32(decay), *rounding)
    _update(stored(base), *run, *(rows or Rows.one(base.size)))


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


def stored(weights: Weights) -> npt.NDArray[Any]:
    """Weights as the kernels take them."""
    return weights.view(np.int16) if weights.dtype == np.float16 else weights

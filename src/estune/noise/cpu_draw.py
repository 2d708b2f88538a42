"""The noise, drawn on the CPU: compiled, and bit for bit the function of `reference.py`.

It lives in a scratch of 32 KiB alone: words of a chunk of counters first, then the transform, in loops split so that
each vectorises (selects instead of branches, 32-bit integers).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from estune.noise import reference as ref
from estune.noise.compiled import jit

CHUNK = 1024  # counters; the scratch for four words and four normals of each then fits the first-level cache

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


def normal(seed: int, tensor: int, start: int, count: int) -> npt.NDArray[np.float32]:
    """Noise of elements `start .. start + count - 1` of the tensor whose 64-bit key is `tensor`, `[count]`."""
    out = np.empty(count, np.float32)
    fill(out, np.uint64(seed), np.uint64(tensor), start)
    return out

"""The noise specification, version 1, in plain NumPy: the yardstick for every faster kernel.

Words come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), normals from
Box-Muller with the polynomials of Cephes' `logf`, `sinf` and `cosf`. Every float32 operation is rounded on its own
(no fused multiply-add, no library transcendental), so the bits are the same on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import numpy.typing as npt

NOISE_VERSION = 1

COLUMNS_AT = 1 << 40
"""Of noise of low rank, how far in the noise of a matrix an outer product's `b` is from its `a`, which begins at 0."""
NEXT_AT = 1 << 41
"""And how far the next outer product's `a` is from this one's."""

PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85
MASK32 = 0xFFFFFFFF

# Cephes polynomials, highest power first.
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SQRT_HALF = 0.70710678
LN2_LOW = -2.12194440e-4
LN2_HIGH = 0.693359375
HALF_PI = 1.57079632679
TWO_POW_MINUS_24 = 2.0**-24

Float32 = npt.NDArray[np.float32]
Uint32 = npt.NDArray[np.uint32]
F = np.float32


def tensor_id(name: str) -> int:
    """64-bit key of a parameter: BLAKE2b (8-byte digest, little-endian) of its name in the checkpoint."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def philox(counter: tuple[Uint32, Uint32, Uint32, Uint32], seed: int) -> tuple[Uint32, Uint32, Uint32, Uint32]:
    """Philox4x32-10: four random words for each counter, under the 64-bit key `seed`. All arrays are of one shape."""
    c0, c1, c2, c3 = (c.astype(np.uint64) for c in counter)
    k0 = seed & MASK32
    k1 = seed >> 32
    mask = np.uint64(MASK32)
    shift = np.uint64(32)
    for _ in range(10):
        p0 = c0 * np.uint64(PHILOX_M0)
        p1 = c2 * np.uint64(PHILOX_M1)
        c0 = (p1 >> shift) ^ c1 ^ np.uint64(k0)
        c1 = p1 & mask
        c2 = (p0 >> shift) ^ c3 ^ np.uint64(k1)
        c3 = p0 & mask
        k0 = (k0 + PHILOX_W0) & MASK32
        k1 = (k1 + PHILOX_W1) & MASK32
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))  # type: ignore[return-value]


def words(seed: int, tensor: int, block: int, count: int) -> Uint32:
    """Random words of blocks `block .. block + count - 1` of a tensor, shape (count, 4)."""
    blocks = np.arange(count, dtype=np.uint64) + np.uint64(block)
    low, high = (np.full(count, half, np.uint32) for half in (tensor & MASK32, tensor >> 32))
    counter = (blocks.astype(np.uint32), (blocks >> np.uint64(32)).astype(np.uint32), low, high)
    return np.stack(philox(counter, seed), axis=1)


def _horner(coefficients: tuple[float, ...], x: Float32) -> Float32:
    total = np.full_like(x, F(coefficients[0]))
    for c in coefficients[1:]:
        total = total * x + F(c)
    return total


def _log(u: Float32) -> Float32:
    """Natural logarithm of u in (0, 1], of any shape."""
    # u = m * 2^e, with m in [sqrt(0.5), sqrt(2)) where the polynomial holds; then ln u = ln m + e ln 2.
    bits = u.view(np.uint32)
    e = (bits >> np.uint32(23)).astype(np.int32) - np.int32(126)
    m = ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F000000)).view(np.float32)
    small = m < F(SQRT_HALF)
    e = np.where(small, e - np.int32(1), e).astype(np.float32)
    m = np.where(small, m + m, m) - F(1)
    z = m * m
    y = (_horner(LOG, m) * m) * z
    y = y + e * F(LN2_LOW)
    y = y - F(0.5) * z
    ln: Float32 = (m + y) + e * F(LN2_HIGH)
    return ln


def box_muller(a: Uint32, b: Uint32) -> tuple[Float32, Float32]:
    """Two standard normals from two random words, all of one shape."""
    # The radius from 24 bits of a; the angle from b: two bits for the quadrant, 24 for the place in it.
    u = ((a >> np.uint32(8)).astype(np.int32) + np.int32(1)).astype(np.float32) * F(TWO_POW_MINUS_24)
    r = np.sqrt(F(-2) * _log(u))
    quadrant = b >> np.uint32(30)
    t = ((b >> np.uint32(6)) & np.uint32(0xFFFFFF)).astype(np.int32).astype(np.float32)
    theta = (t * F(TWO_POW_MINUS_24) - F(0.5)) * F(HALF_PI)
    w = theta * theta
    sin = (_horner(SIN, w) * w) * theta + theta
    cos = (_horner(COS, w) * w) * w - F(0.5) * w + F(1)
    odd = (quadrant & np.uint32(1)) == 1
    cos, sin = np.where(odd, -sin, cos), np.where(odd, cos, sin)
    turned = (quadrant & np.uint32(2)) == 2
    cos = np.where(turned, -cos, cos)
    sin = np.where(turned, -sin, sin)
    return r * cos, r * sin


def root_share(rank: int) -> np.float32:
    """What vectors `a` are multiplied by in noise of this rank: one over its root, rounded to float32."""
    return F(1 / math.sqrt(rank))


def low_rank_by_id(seed: int, tensor: int, columns: int, rank: int, start: int, count: int) -> Float32:
    """Noise of low rank: elements `start .. start + count - 1` of a matrix of so many columns, `[count]`."""
    first = start // columns
    rows = (start + count - 1) // columns + 1 - first
    products = [
        np.outer(
            normal_by_id(seed, tensor, begin + first, rows) * root_share(rank),
            normal_by_id(seed, tensor, begin + COLUMNS_AT, columns),
        )
        for begin in range(0, rank * NEXT_AT, NEXT_AT)
    ]
    flat: Float32 = functools.reduce(np.add, products).ravel()
    return flat[start - first * columns :][:count]


def normal_by_id(seed: int, tensor: int, start: int, count: int) -> Float32:
    """Noise of elements `start .. start + count - 1` of the tensor whose 64-bit key is `tensor`, `[count]`."""
    first = start // 4
    last = (start + count + 3) // 4
    w = words(seed, tensor, first, last - first)
    out = np.empty((last - first, 4), np.float32)
    out[:, 0], out[:, 1] = box_muller(w[:, 0].copy(), w[:, 1].copy())
    out[:, 2], out[:, 3] = box_muller(w[:, 2].copy(), w[:, 3].copy())
    flat: Float32 = out.reshape(-1)[start - 4 * first :][:count]
    return flat

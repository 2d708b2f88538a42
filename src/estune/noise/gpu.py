"""The noise in Triton, and the passes that use it: perturb, update, fingerprint. For CUDA (and ROCm) devices.

Bit for bit the function of `reference.py`: words from Triton's own Philox4x32-10, polynomials written out, products and
sums kept apart (`enable_fp_fusion=False`), a correctly rounded square root. Noise is made in registers; no noise tensor
exists. The functions mirror those of `cpu.py`, on flat torch tensors of float32, bfloat16 or float16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from estune.noise import reference as ref
from estune.noise.cpu import SQUARES_BLOCK, SQUARES_LANES
from estune.noise.rows import Rows

BLOCK = 512  # counters a program; four elements each
WARPS = 8  # two counters a thread: some 40 registers, and 50 for the stochastic update
FINGERPRINT_BLOCK = 2048  # elements a program

_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c) for c in ref.LOG)
_S0, _S1, _S2 = (tl.constexpr(c) for c in ref.SIN)
_C0, _C1, _C2 = (tl.constexpr(c) for c in ref.COS)
_SQRT_HALF = tl.constexpr(ref.SQRT_HALF)
_HALF_PI = tl.constexpr(ref.HALF_PI)
_LN2_LOW = tl.constexpr(ref.LN2_LOW)
_LN2_HIGH = tl.constexpr(ref.LN2_HIGH)
_SCALE = tl.constexpr(ref.TWO_POW_MINUS_24)

# Seeds and keys change from call to call: compiling a variant for each that is 1 or a multiple of 16, or that fits into
# 32 bits, would be waste. Hence this list, and types on all scalars.
_kernel: Any = triton.jit(
    do_not_specialize=["seed", "tensor", "start", "size", "members", "rounding_seed", "width", "pitch", "skip"]
)
_WHOLE = Rows(4, 4)  # for a run that is one stretch, which needs none


@triton.jit
def box_muller(a, b):
    """As `cpu.box_muller`, in registers: two normals of two words."""
    # u in (0, 1], and u = m * 2^e.
    u = ((a >> 8).to(tl.int32) + 1).to(tl.float32) * _SCALE
    bits = u.to(tl.uint32, bitcast=True)
    e = (bits >> 23).to(tl.int32) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    small = m < _SQRT_HALF
    e = tl.where(small, e - 1, e).to(tl.float32)
    m = tl.where(small, m + m, m) - 1.0
    # Cephes' logf, for the radius.
    z = m * m
    y = m * _L0 + _L1
    y = y * m + _L2
    y = y * m + _L3
    y = y * m + _L4
    y = y * m + _L5
    y = y * m + _L6
    y = y * m + _L7
    y = y * m + _L8
    y = (y * m) * z
    y = y + e * _LN2_LOW
    y = y - z * 0.5
    r = tl.sqrt_rn(((m + y) + e * _LN2_HIGH) * -2.0)
    # The angle: its quadrant, and Cephes' sinf and cosf within.
    q = b >> 30
    t = ((b >> 6) & 0xFFFFFF).to(tl.int32).to(tl.float32)
    th = (t * _SCALE - 0.5) * _HALF_PI
    w = th * th
    s = w * _S0 + _S1
    s = s * w + _S2
    s = (s * w) * th + th
    c = w * _C0 + _C1
    c = c * w + _C2
    c = (c * w) * w - w * 0.5 + 1.0
    odd = (q & 1) != 0
    turned = (q & 2) != 0
    # Not -s: Triton 3.6 subtracts from 0 there, and zero loses its sign.
    cos = tl.where(odd, s * -1.0, c)
    sin = tl.where(odd, c, s)
    return r * tl.where(turned, cos * -1.0, cos), r * tl.where(turned, sin * -1.0, sin)


@triton.jit
def random_words(seed, tensor, blocks):
    """As `cpu.random_words`: four 32-bit words for each block."""
    t0 = (tensor.to(tl.uint64) & 0xFFFFFFFF).to(tl.uint32)
    t1 = (tensor.to(tl.uint64) >> 32).to(tl.uint32)
    b = blocks.to(tl.uint64)
    low = (b & 0xFFFFFFFF).to(tl.uint32)
    high = (b >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + t0, zero + t1)


@triton.jit
def _by_element(x0, x1, x2, x3):
    """Elements 0 to 3 of each block, side by side."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def _normals(seed, tensor, blocks):
    w0, w1, w2, w3 = random_words(seed, tensor, blocks)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return _by_element(n0, n1, n2, n3)


@triton.jit
def _narrow(value, like: tl.constexpr):
    """float32 as `like`, to nearest, ties to even; bfloat16 by its bits, which the interpreter would cut off."""
    if like == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(like)


@triton.jit
def _places(start, width, pitch, skip, PITCHED: tl.constexpr, COUNT: tl.constexpr):
    """A program's counters, and where in the run their elements are."""
    if PITCHED:  # rows begin with a counter and end with one
        first = tl.program_id(0).to(tl.int64) * COUNT
        group = (skip // 4 + first).to(tl.int32) + tl.arange(0, COUNT)
        groups = (width // 4).to(tl.int32)
        row = group // groups
        blocks = start // 4 + row.to(tl.int64) * (pitch // 4) + (group - row * groups)
        at = first * 4 + tl.arange(0, 4 * COUNT)
    else:
        first = start // 4 + tl.program_id(0).to(tl.int64) * COUNT
        blocks = first + tl.arange(0, COUNT)
        at = first * 4 - start + tl.arange(0, 4 * COUNT)
    return blocks, at


@_kernel
def _perturb(
    live, base, seed: tl.uint64, tensor: tl.uint64, start: tl.int64, size: tl.int64, sigma: tl.float32,
    width: tl.int64, pitch: tl.int64, skip: tl.int64,
    PITCHED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    blocks, at = _places(start, width, pitch, skip, PITCHED, COUNT)
    noise = _normals(seed, tensor, blocks)
    inside = (at >= 0) & (at < size)
    weights = tl.load(base + at, mask=inside).to(tl.float32)
    tl.store(live + at, _narrow(weights + noise * sigma, live.dtype.element_ty), mask=inside)


@_kernel
def _update(
    base, seeds, coefficients, tensor: tl.uint64, start: tl.int64, size: tl.int64, members: tl.int32,
    decay: tl.float32, rounding_seed: tl.uint64, width: tl.int64, pitch: tl.int64, skip: tl.int64,
    STOCHASTIC: tl.constexpr, PITCHED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    blocks, at = _places(start, width, pitch, skip, PITCHED, COUNT)
    total = tl.zeros((4 * COUNT,), tl.float32)
    for member in range(members):
        total += _normals(tl.load(seeds + member), tensor, blocks) * tl.load(coefficients + member)
    inside = (at >= 0) & (at < size)
    old = tl.load(base + at, mask=inside).to(tl.float32)
    new = old + (old * decay + total)
    if STOCHASTIC:
        w0, w1, w2, w3 = random_words(rounding_seed, tensor, blocks)
        bits = new.to(tl.uint32, bitcast=True) + (_by_element(w0, w1, w2, w3) & 0xFFFF)
        new = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(base + at, _narrow(new, base.dtype.element_ty), mask=inside)


@_kernel
def _fingerprint(
    weights, total, tensor: tl.uint64, start: tl.int64, size: tl.int64, width: tl.int64, pitch: tl.int64,
    skip: tl.int64, BITS: tl.constexpr, PITCHED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = at < size
    place = at
    if PITCHED:
        row = (skip + at) // width
        place = row * pitch + (skip + at - row * width)
    bits = tl.load(weights + at, mask=inside, other=0).to(tl.uint64) & ((1 << BITS) - 1)
    z = tensor.to(tl.uint64) + (start + place).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30) ^ bits) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = tl.where(inside, z ^ (z >> 31), 0)
    tl.atomic_add(total, tl.sum(z.to(tl.int64, bitcast=True), 0), sem="relaxed")


@_kernel
def _squares(now, then, sums, size: tl.int64, BLOCK: tl.constexpr, LANES: tl.constexpr):
    difference = tl.zeros((LANES,), tl.float64)
    norm = tl.zeros((LANES,), tl.float64)
    for row in range(BLOCK // LANES):
        at = tl.program_id(0).to(tl.int64) * BLOCK + row * LANES + tl.arange(0, LANES)
        inside = at < size
        value = tl.load(then + at, mask=inside, other=0).to(tl.float32)
        change = tl.load(now + at, mask=inside, other=0).to(tl.float32) - value
        difference += change.to(tl.float64) * change.to(tl.float64)
        norm += value.to(tl.float64) * value.to(tl.float64)
    tl.store(sums + 2 * tl.program_id(0), _folded(difference, LANES))
    tl.store(sums + 2 * tl.program_id(0) + 1, _folded(norm, LANES))


@triton.jit
def _folded(lanes, LANES: tl.constexpr):
    """The sum of lanes, half upon half. Of two numbers there is one sum, however it is made."""
    for halves in tl.static_range(1, LANES.bit_length()):
        lanes = tl.sum(tl.reshape(lanes, (2, LANES >> halves)), 0)
    return tl.sum(lanes, 0)


def takes(start: int, size: int, rows: Rows) -> bool:
    """Whether `perturb` and `update` take a run of such rows at once: each begins and ends with a counter."""
    aligned = not any(n % 4 for n in (start, rows.width, rows.pitch, rows.skip))
    return aligned and rows.skip + size < 2**33  # counters within the run are 32-bit


def perturb(
    live: torch.Tensor, base: torch.Tensor, seed: int, tensor: int, start: int, sigma: float, rows: Rows | None = None
) -> None:
    """As `cpu.perturb`, of flat tensors `[elements]` on the device, for rows that `takes` says can be taken."""
    if base.numel():
        _perturb[_grid(start, base.numel(), rows)](
            live,
            base,
            seed,
            tensor,
            start,
            base.numel(),
            sigma,
            *(rows or _WHOLE),
            PITCHED=rows is not None,
            COUNT=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def update(
    base: torch.Tensor,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    tensor: int,
    start: int,
    decay: float = 0.0,
    rounding_seed: int | None = None,
    rows: Rows | None = None,
) -> None:
    """As `cpu.update`, of a flat tensor `[elements]` on the device, for rows that `takes` says can be taken.

    `seeds` are int64 (their bits) and `coefficients` float32, `[members]` each, both on the device.
    """
    if base.numel():
        _update[_grid(start, base.numel(), rows)](
            base,
            seeds,
            coefficients,
            tensor,
            start,
            base.numel(),
            seeds.numel(),
            decay,
            rounding_seed or 0,
            *(rows or _WHOLE),
            STOCHASTIC=rounding_seed is not None and base.dtype == torch.bfloat16,
            PITCHED=rows is not None,
            COUNT=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def fingerprint(weights: torch.Tensor, tensor: int, start: int, total: torch.Tensor, rows: Rows | None = None) -> None:
    """As `cpu.fingerprint`, added to `total`, int64 `[1]` on the device: no wait for the device until it is read."""
    if weights.numel():
        bits = 8 * weights.element_size()
        flat = weights.view(torch.int32 if bits == 32 else torch.int16)
        grid = (triton.cdiv(weights.numel(), FINGERPRINT_BLOCK),)
        _fingerprint[grid](
            flat,
            total,
            tensor,
            start,
            weights.numel(),
            *(rows or _WHOLE),
            BITS=bits,
            PITCHED=rows is not None,
            COUNT=FINGERPRINT_BLOCK,
        )


def squares(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """As `cpu.squares`, of flat tensors `[elements]` on the device."""
    blocks = triton.cdiv(now.numel(), SQUARES_BLOCK)
    sums = torch.empty(blocks, 2, dtype=torch.float64, device=now.device)
    if blocks:
        _squares[(blocks,)](
            now, then, sums, now.numel(), BLOCK=SQUARES_BLOCK, LANES=SQUARES_LANES, enable_fp_fusion=False
        )
    return sums


def _grid(start: int, size: int, rows: Rows | None) -> tuple[int]:
    blocks = (size + 3) // 4 if rows else (start + size + 3) // 4 - start // 4
    return (triton.cdiv(blocks, BLOCK),)

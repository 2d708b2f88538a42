"""Matrix products of bfloat16 by the processor's own matrix unit (Intel's AMX), as decoding needs them.

A tile holds 16 rows of 64 bytes, and one instruction adds the products of two tiles, 16 x 32 by 32 x 16, to a third of
float32. The second factor has to be laid out for it, two neighbours of the width side by side. Few tokens are: then the
weight goes into tiles as it lies in memory, the unit computes `weight @ x.T`, and its tiles are transposed on their way
out. For many tokens it is the weight that is laid out, some columns at a time, as that takes less than transposing.

An element of the result is summed up in the same order either way, wherever it lies in a tile and whatever lies beside
it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from estune.engines.cpu.simd import WIDTH, address, load, prefetch, store
from estune.noise.compiled import jit

BLOCK = 16  # rows of a tile
DEPTH = 32  # elements of bfloat16 in a row of a tile
PACK_WEIGHTS_FROM = 256
"""Tokens from which on the weights are laid out: wide products take 0.9 of the time by then, all less from 512 on."""
SCRATCH = 4 * BLOCK * BLOCK
"""Elements that hold four tiles of sums."""
PANEL = 1 << 17
"""Elements, pairs of weights, that are laid out at a time: they stay in a core's second cache, and tokens pass by."""
_BYTES = 64  # of a row of a tile
_TILE = BLOCK * _BYTES
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: asm/prctl.h, and the state's number

_BYTE, _INT, _LONG = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER = _BYTE.as_pointer()

# The tiles, by number: sums of two blocks by two, then two of the first factor, and two of the second.
_SUMS, _ROWS, _PACKED = 0, 4, 6
PALETTE = np.zeros(_BYTES, np.uint8)
"""What the unit is told first: eight tiles, all of the largest size."""
PALETTE[0] = 1
PALETTE[16:32].view(np.uint16)[:] = _BYTES
PALETTE[48:56] = BLOCK


@functools.cache
def available() -> bool:
    """Whether there is such a unit, and Linux lets this process use it: it has to be asked, as threads' state grows."""
    features = llvmlite.binding.get_host_cpu_features()
    if platform.system() != "Linux" or not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@jit
def round_rows(x, rounded):
    """Round `x`, float32 `[tokens, width]`, to bfloat16, into the first rows of `rounded`, uint16 `[rows, width]`."""
    for i in range(0, x.size, WIDTH):
        store(rounded, i, load(x, i))


@jit
def pack(pairs, packed):
    """Lay rows out as the unit's second factor: of sixteen rows, each two neighbours of the width side by side.

    Args:
        pairs: `[a multiple of 16, width / 2]`: two bfloat16 as one float32.
        packed: as many elements, `[rows / 16, 16 * width / 2]`: for each pair of columns, that pair of every row.
    """
    rows, width = pairs.shape
    for first in range(0, rows * width, BLOCK * width):
        for i in range(0, width, BLOCK):
            _transpose(pairs, first + i, width, packed, first + i * BLOCK, BLOCK)


@jit
def product(packed, weight, out, first, last, palette, scratch):
    """`out = x @ weight.T` in its columns from `first` to `last - 1`, a multiple of 16 of them, for few tokens.

    All arrays begin with a cache line: the unit reads what does not at a quarter of its speed.

    Args:
        packed: what `pack` made of the rounded x, float32 `[blocks of tokens, width * 8]`.
        weight: `[columns, width]` in bfloat16 as its bits in uint16, the width a multiple of 32.
        out: float32 `[tokens, columns]`, whole blocks of tokens.
        first, last: the columns.
        palette: `PALETTE`.
        scratch: float32 `[SCRATCH]`, which a thread has for itself.
    """
    width = weight.shape[1]
    blocks = len(packed)
    side = 2 * BLOCK
    one = np.int64(1)  # of mere numbers `_put` would be compiled for each
    two = np.int64(2)
    _configure(palette)
    # Two blocks of weights at a time, and of tokens, so that every tile that is loaded serves twice.
    c = first
    while c + side <= last:
        b = np.int64(0)
        while b + 2 <= blocks:
            at = b * width * 8
            if b == 0:  # the weights that follow are asked of the memory meanwhile, once
                _multiply(weight, c * width, width, packed, at, scratch, 0, side, 2, 2, 1)
            else:
                _multiply(weight, c * width, width, packed, at, scratch, 0, side, 2, 2, 0)
            _put(scratch, out, c, b, two, two)
            b += 2
        if b < blocks:
            _multiply(weight, c * width, width, packed, b * width * 8, scratch, 0, side, 2, 1, 1)
            _put(scratch, out, c, b, two, one)
        c += side
    if c < last:
        for block in range(blocks):
            _multiply(weight, c * width, width, packed, block * width * 8, scratch, 0, side, 1, 1, 0)
            _put(scratch, out, c, block, one, one)
    _release()


@jit
def _put(scratch, out, column, block, rows, across):
    """Write tiles of sums, `rows` blocks of columns by `across` of tokens, to their places, transposed."""
    columns = out.shape[1]
    side = 2 * BLOCK
    for j in range(across):
        target = (block + j) * BLOCK * columns + column
        for i in range(rows):
            _transpose(scratch, i * BLOCK * side + j * BLOCK, side, out, target + i * BLOCK, columns)


@jit
def product_of_many(rounded, pairs, out, first, last, palette, packed):
    """As `product`, for many tokens; to the same bits.

    Args:
        rounded: x in bfloat16 as its bits in uint16, `[tokens, width]`, whole blocks of tokens.
        pairs: the weight, `[columns, width / 2]`: two bfloat16 as one float32.
        out, first, last, palette: as for `product`.
        packed: float32 `[panel(width)]`, which a thread has for itself.
    """
    tokens, width = rounded.shape
    columns = out.shape[1]
    side = 2 * BLOCK
    _configure(palette)
    for start in range(first, last, 2 * len(packed) // width):
        count = min(last - start, 2 * len(packed) // width)
        pack(pairs[start : start + count], packed)
        for t in range(0, tokens, side):
            both = t + side <= tokens
            for c in range(0, count, side):
                at = c * width // 2
                to = t * columns + start + c
                if c + side > count:
                    if both:
                        _multiply(rounded, t * width, width, packed, at, out, to, columns, 2, 1, 0)
                    else:
                        _multiply(rounded, t * width, width, packed, at, out, to, columns, 1, 1, 0)
                elif both:
                    _multiply(rounded, t * width, width, packed, at, out, to, columns, 2, 2, 0)
                else:
                    _multiply(rounded, t * width, width, packed, at, out, to, columns, 1, 2, 0)
    _release()


def panel(width: int) -> int:
    """Elements that hold as many columns of a weight, laid out, as are at a time: at least two blocks."""
    block = BLOCK * width // 2
    return max(2, PANEL // block // 2 * 2) * block


@intrinsic
def _configure(typing: Any, palette: Any) -> Any:
    """Tell the unit what its tiles are, until `_release`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where = _at(context, builder, palette, args[0], ir.Constant(_LONG, 0))
        builder.call(_instruction(builder, "ldtilecfg", _POINTER), [where])
        return context.get_dummy_value()

    return types.void(palette), generate


@intrinsic
def _release(typing: Any) -> Any:
    """Leave the unit, so that the system need not keep its tiles."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_instruction(builder, "tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def _multiply(
    typing: Any,
    rows: Any,
    there: Any,
    width: Any,
    packed: Any,
    at: Any,
    out: Any,
    to: Any,
    pitch: Any,
    down: Any,
    across: Any,
    ahead: Any,
) -> Any:
    """The products of `down` blocks of rows, from index `there` on, with `across` packed blocks, from `at` on.

    The tile of row block i and packed block j goes to `out`, float32, from index `to + 16 (i * pitch + j)` on, its rows
    `pitch` apart. With `ahead` 1, the rows that follow are asked of the memory meanwhile. It and the numbers of blocks,
    each 1 or 2, are constants, as in `simd.products`.
    """
    constants = (down, across, ahead)
    if not all(isinstance(constant, types.IntegerLiteral) for constant in constants):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, there, width, _, at, _, to, pitch, *_ = args
        count_rows = down.literal_value
        count_across = across.literal_value
        zero = _instruction(builder, "tilezero", _BYTE)
        read = _instruction(builder, "tileloadd64", _BYTE, _POINTER, _LONG)
        dot = _instruction(builder, "tdpbf16ps", _BYTE, _BYTE, _BYTE)
        write = _instruction(builder, "tilestored64", _BYTE, _POINTER, _LONG)

        def number(value: int) -> ir.Constant:
            return ir.Constant(_LONG, value)

        def tile(value: int) -> ir.Constant:
            return ir.Constant(_BYTE, value)

        from_rows = _at(context, builder, rows, args[0], there)
        from_packed = _at(context, builder, packed, args[3], at)
        row_bytes = builder.mul(width, number(2))
        per_block = builder.mul(width, number(2 * BLOCK))  # bytes of a block, of rows and packed alike
        for i in range(count_rows * count_across):
            builder.call(zero, [tile(_SUMS + i)])
        with cgutils.for_range(builder, builder.udiv(width, number(DEPTH))) as loop:
            step = loop.index
            for j in range(count_across):
                offset = builder.add(builder.mul(step, number(_TILE)), builder.mul(per_block, number(j)))
                builder.call(read, [tile(_PACKED + j), builder.gep(from_packed, [offset]), number(_BYTES)])
            for i in range(count_rows):
                offset = builder.add(builder.mul(step, number(_BYTES)), builder.mul(per_block, number(i)))
                builder.call(read, [tile(_ROWS + i), builder.gep(from_rows, [offset]), row_bytes])
                for j in range(count_across):
                    sum_of = tile(_SUMS + i * count_across + j)
                    builder.call(dot, [sum_of, tile(_ROWS + i), tile(_PACKED + j)])
            if ahead.literal_value:
                # What comes next follows in memory: as many bytes of it as a step takes of these rows.
                begin = builder.mul(per_block, number(count_rows))
                begin = builder.add(begin, builder.mul(step, number(_TILE * count_rows)))
                for line in range(BLOCK * count_rows):
                    prefetch(builder, builder.gep(from_rows, [builder.add(begin, number(line * _BYTES))]))
        pitch_bytes = builder.mul(pitch, number(4))
        target = _at(context, builder, out, args[5], to)
        for i in range(count_rows):
            for j in range(count_across):
                offset = builder.add(builder.mul(pitch_bytes, number(BLOCK * i)), number(_BYTES * j))
                builder.call(write, [tile(_SUMS + i * count_across + j), builder.gep(target, [offset]), pitch_bytes])
        return context.get_dummy_value()

    whole = (types.intp,) * 2
    return types.void(rows, *whole, packed, types.intp, out, *whole, *constants), generate


@intrinsic
def _transpose(typing: Any, source: Any, index: Any, pitch: Any, target: Any, to: Any, target_pitch: Any) -> Any:
    """Copy 16 x 16 float32 transposed, in four steps that each pair up rows.

    They lie in `source` from `index` on, rows `pitch` apart, and go to `target` from `to` on, rows `target_pitch`
    apart.
    """
    floats = ir.VectorType(ir.FloatType(), BLOCK)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def places(kind: Any, array: Any, first: Any, apart: Any) -> list[Any]:
            indices = [builder.add(first, builder.mul(apart, ir.Constant(_LONG, row))) for row in range(BLOCK)]
            return [address(context, builder, kind, (array, each), floats) for each in indices]

        rows = [builder.load(place, align=4) for place in places(source, *args[:3])]
        size = BLOCK // 2
        while size:
            # Rows that lie `size` apart exchange blocks of `size`: the upper's second and the lower's first.
            upper = [i if not i & size else BLOCK + i - size for i in range(BLOCK)]
            lower = [i + size if not i & size else BLOCK + i for i in range(BLOCK)]
            masks = [ir.Constant(ir.VectorType(_INT, BLOCK), mask) for mask in (upper, lower)]
            changed = list(rows)
            for i in range(BLOCK):
                if not i & size:
                    pair = rows[i], rows[i + size]
                    changed[i], changed[i + size] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            rows = changed
            size //= 2
        for place, row in zip(places(target, *args[3:]), rows, strict=True):
            builder.store(row, place, align=4)
        return context.get_dummy_value()

    whole = (types.intp,) * 2
    return types.void(source, *whole, target, *whole), generate


def _instruction(builder: Any, name: str, *kinds: ir.Type) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")


def _at(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    """Where element `index` of an array is in memory, byte by byte."""
    return builder.bitcast(address(context, builder, kind, (value, index), context.get_data_type(kind.dtype)), _POINTER)

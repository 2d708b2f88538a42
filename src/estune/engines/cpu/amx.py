"""Matrix products of bfloat16 by the processor's own matrix unit (Intel's AMX), as decoding needs them.

A tile holds 16 rows of 64 bytes, and one instruction adds the products of two tiles, 16 x 32 by 32 x 16, to a third of
float32. The weight goes into tiles as it lies in memory, and is read once for all tokens. It is the few activations
that are rounded to bfloat16 and laid out in the order that the unit asks of its second factor, two neighbours of the
width side by side. So the unit computes `weight @ x.T`, and its tiles are transposed on their way out.

An element of the result is summed up in the same order wherever it lies in a tile and whatever lies beside it.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from estune.engines.cpu.simd import WIDTH, address, load, prefetch, store

BLOCK = 16  # rows of a tile
DEPTH = 32  # elements of bfloat16 in a row of a tile
_BYTES = 64  # of a row of a tile
_TILE = BLOCK * _BYTES
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: asm/prctl.h, and the state's number

_jit: Any = numba.njit(nogil=True, error_model="numpy", cache=True)
_BYTE, _INT, _LONG = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER = _BYTE.as_pointer()

# The tiles, by number: sums of two blocks of weights by two of tokens, then the weights, then the tokens.
_SUMS, _WEIGHTS, _TOKENS = 0, 4, 6
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


def packed_shape(tokens: int, width: int) -> tuple[int, int]:
    """Shape of the array that `pack` fills: a block of tokens a row."""
    return -(-tokens // BLOCK), width * BLOCK


@_jit
def pack(x, packed):
    """Round `x`, float32 `[tokens, width]`, to bfloat16, and lay it out as the unit's second factor.

    `packed` is uint16 `[blocks, width * 16]`, of zeros: for each block of sixteen tokens, and each pair of neighbours
    in their rows, that pair of every token. The width is a multiple of 32.
    """
    tokens, width = x.shape
    rounded = np.empty(width, np.uint16)
    for t in range(tokens):
        for i in range(0, width, WIDTH):
            store(rounded, i, load(x, t * width + i))
        block = t // BLOCK
        place = 2 * (t % BLOCK)
        for i in range(0, width, 2):
            packed[block, i * BLOCK + place] = rounded[i]
            packed[block, i * BLOCK + place + 1] = rounded[i + 1]


@_jit
def product(packed, weight, out, first, last, palette):
    """`out = x @ weight.T` in its columns from `first` to `last - 1`, a multiple of 16 of them.

    `packed` is what `pack` made of x, `weight` `[columns, width]` in bfloat16 as its bits in uint16, the width a
    multiple of 32, and `out` float32 `[tokens, columns]`.
    """
    width = weight.shape[1]
    blocks, size = packed.shape
    sums = np.empty(4 * BLOCK * BLOCK, np.float32)
    _configure(palette)
    # Two blocks of weights at a time, and of tokens, so that every tile that is loaded serves twice.
    c = first
    while c + 2 * BLOCK <= last:
        for b in range(0, blocks - 1, 2):
            _multiply(weight, c * width, width, packed, b * size, sums, 2, 2)
            _put(sums, 0, out, c, b, 2)
            _put(sums, 2, out, c + BLOCK, b, 2)
        if blocks % 2:
            _multiply(weight, c * width, width, packed, (blocks - 1) * size, sums, 2, 1)
            _put(sums, 0, out, c, blocks - 1, 1)
            _put(sums, 1, out, c + BLOCK, blocks - 1, 1)
        c += 2 * BLOCK
    if c < last:
        for b in range(blocks):
            _multiply(weight, c * width, width, packed, b * size, sums, 1, 1)
            _put(sums, 0, out, c, b, 1)
    _release()


@_jit
def _put(sums, tile, out, column, block, count):
    """Write so many tiles of sums, `[columns, tokens]` each, to their columns and blocks of tokens, transposed."""
    tokens, columns = out.shape
    for b in range(count):
        _transpose(sums, (tile + b) * BLOCK * BLOCK)
        begin = (block + b) * BLOCK
        for t in range(min(BLOCK, tokens - begin)):
            store(out, (begin + t) * columns + column, load(sums, (tile + b) * BLOCK * BLOCK + t * BLOCK))


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
    typing: Any, weight: Any, there: Any, width: Any, packed: Any, at: Any, sums: Any, rows: Any, across: Any
) -> Any:
    """The products of `rows` blocks of weights, from index `there` on, with `across` blocks of tokens, from `at` on.

    The tile of sums of weights i and tokens j becomes tile i * across + j of `sums`. Both numbers are 1 or 2, and
    constants, as in `simd.products`. Meanwhile the weights that follow are asked of the memory.
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, across)):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, there, width, _, at, *_ = args
        count_rows = rows.literal_value
        count_across = across.literal_value
        zero = _instruction(builder, "tilezero", _BYTE)
        read = _instruction(builder, "tileloadd64", _BYTE, _POINTER, _LONG)
        dot = _instruction(builder, "tdpbf16ps", _BYTE, _BYTE, _BYTE)
        write = _instruction(builder, "tilestored64", _BYTE, _POINTER, _LONG)

        def number(value: int) -> ir.Constant:
            return ir.Constant(_LONG, value)

        def tile(value: int) -> ir.Constant:
            return ir.Constant(_BYTE, value)

        from_weight = _at(context, builder, weight, args[0], there)
        from_packed = _at(context, builder, packed, args[3], at)
        pitch = builder.mul(width, number(2))  # bytes of a row of the weight
        per_block = builder.mul(width, number(2 * BLOCK))  # bytes of a block, of weights and of tokens alike
        for i in range(count_rows * count_across):
            builder.call(zero, [tile(_SUMS + i)])
        with cgutils.for_range(builder, builder.udiv(width, number(DEPTH))) as loop:
            step = loop.index
            for j in range(count_across):
                offset = builder.add(builder.mul(step, number(_TILE)), builder.mul(per_block, number(j)))
                builder.call(read, [tile(_TOKENS + j), builder.gep(from_packed, [offset]), number(_BYTES)])
            for i in range(count_rows):
                offset = builder.add(builder.mul(step, number(_BYTES)), builder.mul(per_block, number(i)))
                builder.call(read, [tile(_WEIGHTS + i), builder.gep(from_weight, [offset]), pitch])
                for j in range(count_across):
                    sum_of = tile(_SUMS + i * count_across + j)
                    builder.call(dot, [sum_of, tile(_WEIGHTS + i), tile(_TOKENS + j)])
            # The weights that come next follow on these in memory: as many bytes of them as a step takes of these.
            ahead = builder.mul(per_block, number(count_rows))
            ahead = builder.add(ahead, builder.mul(step, number(_TILE * count_rows)))
            for line in range(BLOCK * count_rows):
                prefetch(builder, builder.gep(from_weight, [builder.add(ahead, number(line * _BYTES))]))
        target = _at(context, builder, sums, args[5], number(0))
        for i in range(count_rows * count_across):
            builder.call(write, [tile(_SUMS + i), builder.gep(target, [number(i * _TILE)]), number(_BYTES)])
        return context.get_dummy_value()

    whole = (types.intp,) * 2
    return types.void(weight, *whole, packed, types.intp, sums, rows, across), generate


@intrinsic
def _transpose(typing: Any, array: Any, index: Any) -> Any:
    """Transpose 16 x 16 float32 of an array in place, from `index` on, in four steps that each pair up rows."""
    floats = ir.VectorType(ir.FloatType(), BLOCK)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = address(context, builder, array, args, floats)
        places = [builder.gep(start, [_INT(row)]) for row in range(BLOCK)]
        rows = [builder.load(place, align=4) for place in places]
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
        for place, row in zip(places, rows, strict=True):
            builder.store(row, place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _instruction(builder: Any, name: str, *kinds: ir.Type) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}")


def _at(context: Any, builder: Any, kind: Any, value: Any, index: Any) -> Any:
    """Where element `index` of an array is in memory, byte by byte."""
    return builder.bitcast(address(context, builder, kind, (value, index), context.get_data_type(kind.dtype)), _POINTER)

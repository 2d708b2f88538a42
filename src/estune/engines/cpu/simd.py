"""Sixteen float32 as one value inside compiled functions.

The compiler vectorises a short loop over several arrays only behind checks that they do not overlap, and these cost
more than the loop. With vectors as a type of their own nothing is left to guess. Any processor will do: LLVM splits
them into registers of the width that it has.

`load` and `store` take a C-contiguous array of any shape and a flat index, unchecked. Arrays of uint16 hold the bits of
bfloat16, widened on the way in and rounded to nearest, ties to even, on the way out.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

WIDTH = 16
_INT = ir.IntType(32)
_FLOATS, _INTS, _HALVES = (ir.VectorType(t, WIDTH) for t in (ir.FloatType(), _INT, ir.IntType(16)))


class _Vector(types.Type):  # type: ignore[misc]  # numba carries no types
    def __init__(self) -> None:
        super().__init__(name=f"float32x{WIDTH}")


VECTOR = _Vector()


@register_model(_Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Elements `index` to `index + 15`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widened(builder, array, address(context, builder, array, args, _HALVES))

    return (VECTOR(array, types.intp), generate) if _is_stored(array) else None


@intrinsic
def element(typing: Any, array: Any, index: Any) -> Any:
    """Element `index` alone."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(address(context, builder, array, args, context.get_data_type(array.dtype)))
        if array.dtype == types.float32:
            return value
        bits = builder.zext(value, _INT)
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, 16)), ir.FloatType())

    return (types.float32(array, types.intp), generate) if _is_stored(array) else None


@intrinsic(prefer_literal=True)
def products(
    typing: Any,
    x: Any,
    at: Any,
    weight: Any,
    there: Any,
    width: Any,
    out: Any,
    to: Any,
    stride: Any,
    rows: Any,
    columns: Any,
    ahead: Any,
) -> Any:
    """The dot products of `rows` neighbouring rows of one matrix with `columns` of another.

    Rows have `width` elements, a multiple of 16, and lie in `x` from index `at` and in `weight` from index `there` on;
    the product of row r and row c is written to element `to + r * stride + c` of `out`, which holds float32. Each is a
    sum of sixteen sums, by fused multiplication and addition, and these are added by halves: the same bits, however
    many rows and columns are taken at once.

    Elements of `weight` that lie `ahead` further on are asked of the memory meanwhile, if that is not 0. It and the
    numbers of rows and columns are constants: a function made for each would have another name in every process, and
    what calls it would never be found in Numba's cache.
    """
    constants = (rows, columns, ahead)
    if not all(isinstance(constant, types.IntegerLiteral) for constant in constants):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, at, _, there, width, _, to, stride, *_ = args

        def number(value: int) -> ir.Constant:
            return ir.Constant(width.type, value)

        def row(kind: Any, place: Any, index: Any, count: int) -> Any:
            index = builder.add(index, builder.mul(width, number(count)))
            return address(context, builder, kind, (place, index), context.get_data_type(kind.dtype))

        def vector(kind: Any, start: Any, k: Any) -> Any:
            return _widened(builder, kind, builder.gep(start, [k]))

        distance = ahead.literal_value
        across = columns.literal_value
        lefts = [row(x, args[0], at, r) for r in range(rows.literal_value)]
        rights = [row(weight, args[2], there, c) for c in range(across)]
        # Variables on the stack, which the compiler keeps in registers.
        sums = [[cgutils.alloca_once_value(builder, _all(0.0)) for _ in rights] for _ in lefts]
        for variable in (s for of_row in sums for s in of_row):
            builder.store(_all(0.0), variable)
        with cgutils.for_range_slice(builder, number(0), width, number(WIDTH), inc=True) as (k, _):
            factors = [vector(weight, start, k) for start in rights]
            for start in rights if distance else ():
                prefetch(builder, builder.gep(start, [builder.add(k, number(distance))]))
            for start, of_row in zip(lefts, sums, strict=True):
                a = vector(x, start, k)
                for b, variable in zip(factors, of_row, strict=True):
                    builder.store(_call(builder, "fma", a, b, builder.load(variable)), variable)
        totals = _totals(builder, [builder.load(s) for of_row in sums for s in of_row])
        for i, value in enumerate(totals):
            index = builder.add(builder.add(to, builder.mul(stride, number(i // across))), number(i % across))
            target = address(context, builder, out, (args[5], index), ir.FloatType())
            builder.store(value, target)
        return context.get_dummy_value()

    stored = _is_stored(x) and _is_stored(weight) and _is_stored(out) and out.dtype == types.float32
    whole = (types.intp,) * 2
    kind = types.void(x, types.intp, weight, *whole, out, *whole, *constants)
    return (kind, generate) if stored else None


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    """Write elements `index` to `index + 15`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if array.dtype == types.float32:
            builder.store(value, address(context, builder, array, args, _FLOATS), align=4)
        else:
            bits = builder.bitcast(value, _INTS)
            parity = builder.and_(builder.lshr(bits, _all(16, _INTS)), _all(1, _INTS))
            bits = builder.lshr(builder.add(builder.add(bits, _all(0x7FFF, _INTS)), parity), _all(16, _INTS))
            target = address(context, builder, array, args, _HALVES)
            builder.store(builder.trunc(bits, _HALVES), target, align=2)
        return context.get_dummy_value()

    return (types.void(array, types.intp, VECTOR), generate) if _is_stored(array) else None


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One float32 in all places."""

    return VECTOR(types.float32), lambda context, builder, signature, args: _repeat(builder, args[0])


@intrinsic
def exp(typing: Any, x: Any) -> Any:
    """e^x to 2 units in the last place, for x from -87.3 to 87.3; what lies beyond counts as the bound.

    e^x = 2^n 2^f with f in [-0.5, 0.5], and 2^f by a polynomial of our own fit, off by 2e-9 at most before rounding.
    """
    polynomial = (1.534581087e-4, 1.339993121e-3, 9.618488961e-3, 5.550328777e-2, 2.402264689e-1, 6.931472057e-1, 1.0)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        y = builder.fmul(args[0], _all(1.4426950408889634))
        y = _call(builder, "maxnum", _call(builder, "minnum", y, _all(126.0)), _all(-126.0))
        n = _call(builder, "floor", builder.fadd(y, _all(0.5)))
        f = builder.fsub(y, n)
        p = _all(polynomial[0])
        for coefficient in polynomial[1:]:
            p = _call(builder, "fma", p, f, _all(coefficient))
        power = builder.shl(builder.add(builder.fptosi(n, _INTS), _all(127, _INTS)), _all(23, _INTS))
        return builder.fmul(p, builder.bitcast(power, _FLOATS))

    return VECTOR(VECTOR), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    return VECTOR(VECTOR, VECTOR, VECTOR), lambda context, builder, signature, args: _call(builder, "fma", *args)


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """The larger of each pair; of a number and NaN, the number."""
    return VECTOR(VECTOR, VECTOR), lambda context, builder, signature, args: _call(builder, "maxnum", *args)


@intrinsic
def first_of(typing: Any, x: Any, count: Any, other: Any) -> Any:
    """The first `count` of the sixteen, and `other` in the places after them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count, other = args
        places = ir.Constant(_INTS, list(range(WIDTH)))
        return builder.select(builder.icmp_signed("<", places, _repeat(builder, builder.trunc(count, _INT))), x, other)

    return VECTOR(VECTOR, types.intp, VECTOR), generate


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """Sum of the sixteen, by halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _reduce(builder, "fadd", [ir.Constant(ir.FloatType(), 0.0), args[0]])

    return types.float32(VECTOR), generate


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """Largest of the sixteen; NaN if all are."""
    return types.float32(VECTOR), lambda context, builder, signature, args: _reduce(builder, "fmax", args)


def _define(operation: Any, instruction: str) -> None:
    @type_callable(operation)
    def kind(context: Any) -> Any:
        return lambda a, b: VECTOR if a == b == VECTOR else None

    @lower_builtin(operation, VECTOR, VECTOR)
    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


def _is_stored(kind: Any) -> bool:
    return isinstance(kind, types.Array) and kind.layout == "C" and kind.dtype in (types.float32, types.uint16)


def address(context: Any, builder: Any, kind: Any, place: Any, stored: ir.Type) -> Any:
    """Where `place`, an array of type `kind` and an index, and maybe more, is in memory."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=place[0]).data
    return builder.bitcast(builder.gep(data, [place[1]]), stored.as_pointer())


def _widened(builder: Any, kind: Any, pointer: Any) -> Any:
    """Sixteen elements from `pointer` on, of an array of type `kind`, as float32."""
    if kind.dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
    bits = builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
    return builder.bitcast(builder.shl(builder.zext(bits, _INTS), _all(16, _INTS)), _FLOATS)


def prefetch(builder: Any, pointer: Any) -> None:
    """Have the cache line at `pointer` brought into all caches, wherever that is: it is never an error."""
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, _INT, _INT, _INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [address, _INT(0), _INT(3), _INT(1)])  # to read, to keep, data


def _totals(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of each vector, by halves; halves of several are added at once."""
    count = len(vectors)
    size = WIDTH  # of the part of a vector that is one sum's
    while size > 1:
        if len(vectors) % 2:
            vectors = [*vectors, vectors[-1]]
        lower = ir.Constant(_INTS, [i for i in range(2 * WIDTH) if i % size < size // 2])
        upper = ir.Constant(_INTS, [i for i in range(2 * WIDTH) if i % size >= size // 2])
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, lower), builder.shuffle_vector(a, b, upper))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        size //= 2
    return [builder.extract_element(vectors[i // WIDTH], _INT(i % WIDTH)) for i in range(count)]


def _all(value: float, kind: ir.VectorType = _FLOATS) -> ir.Constant:
    return ir.Constant(kind, [value] * WIDTH)


def _repeat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(one, one, _all(0, _INTS))


def _call(builder: Any, name: str, *values: Any) -> Any:
    """An LLVM intrinsic, place by place."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(values))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32"), values)


def _reduce(builder: Any, name: str, values: Any) -> Any:
    kind = ir.FunctionType(ir.FloatType(), [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{WIDTH}f32")
    return builder.call(function, values, fastmath=("reassoc",))

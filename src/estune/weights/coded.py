"""Quantised checkpoints whose matrices are integers times scales, read as such and without their formats' packages.

Each matrix lies in several tensors: words that hold some integers each, scales, and zero points where there are any.
Here it is one again, under the name that it has where the model is not quantised: to all others its elements are
float32, integer times scale, and to `grid.py` integers and scales. Formats that round what is multiplied, too, or whose
weights are no integers, are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError
from estune.weights.tensors import STORAGE, Array, Tensor, widen

# Bits of torchao's integers, by the settings that round weights alone.
_TORCHAO: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "Int8WeightOnlyConfig": lambda _: 8,
    "IntxWeightOnlyConfig": lambda data: int(data["weight_dtype"]["_data"].removeprefix("int")),
}
_PACKED = {(4, True), (4, False), (8, True), (8, False)}  # bits, and whether symmetric, of compressed-tensors' integers
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word of AWQ's the first, second, ... integer is
_PARTS = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "awq": ("qweight", "scales", "qzeros"),
    "torchao": ("_weight_qdata", "_weight_scale", "_weight_zero_point"),
}
"""What a matrix is made of, by the method's name: its integers, scales, and what else there may be."""
READ = frozenset(_PARTS)
"""The methods, as a config.json calls them, of which matrices can be read."""
# What a damaged file leads to.
_DAMAGED = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)

Integers = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
_Read = Callable[[str, Mapping[str, Tensor | None]], "CodedTensor | None"]
"""Reads a matrix of a name from its parts; None where it cannot."""


class Rows(NamedTuple):
    """Rows of a matrix: integers `[rows, columns]`, and scales `[rows, groups]`, by which they are multiplied."""

    codes: Integers
    scales: Floats


@dataclass(frozen=True, slots=True)
class CodedTensor(Tensor):
    """A matrix that a checkpoint holds as integers: to who reads its elements, float32. `file` is its integers'.

    Attributes:
        group_size: neighbours in a row that share a scale; 1 where those that do are no neighbours.
        low, high: between which its integers are.
        rows: reads rows, from one to before another.
    """

    group_size: int
    low: int
    high: int
    rows: Callable[[int, int], Rows]

    def coded(self, start: int, count: int, group_size: int) -> tuple[Integers, Floats]:
        """Integers `[count]` and scales `[count // group_size]` of elements of whole groups.

        Args:
            start, count: which elements.
            group_size: neighbours that are to share a scale, which divides the tensor's own.

        Raises:
            EstuneError: a scale is not finite, or an integer is not between `low` and `high`.
        """
        (codes, scales), skip = self._around(start, count)
        scales = np.repeat(scales, self.group_size // group_size, axis=1).reshape(-1)
        return codes.reshape(-1)[skip : skip + count], scales[skip // group_size : (skip + count) // group_size]

    def stored(self, start: int = 0, count: int | None = None) -> Array:
        """Elements `start .. start + count - 1`, integer times scale, float32 `[count]`.

        Raises:
            EstuneError: as `coded`.
        """
        count = self.elements - start if count is None else count
        (codes, scales), skip = self._around(start, count)
        values: Array = codes.astype(np.float32) * np.repeat(scales, self.group_size, axis=1)
        return values.reshape(-1)[skip : skip + count]

    def raw(self) -> Iterator[bytes]:
        """The elements' bytes, a few MiB at a time."""
        return (part.tobytes() for part in self.runs())

    def _around(self, start: int, count: int) -> tuple[Rows, int]:
        """The rows that some elements are in, and the place of the first there; raises as `coded`."""
        first = start // self.columns
        end = -(-(start + count) // self.columns)
        found = self.rows(first, end)
        if not np.isfinite(found.scales).all():
            raise EstuneError(
                f"{self.file}: {self.name} has a scale that is no finite number; copy or quantise it again"
            )
        if not ((found.codes >= self.low) & (found.codes <= self.high)).all():
            raise EstuneError(
                f"{self.file}: {self.name} has integers beyond {self.low} to {self.high}, which are all that there are "
                "of the bits that quantization_config in config.json says; take the one that belongs to these weights"
            )
        return found, start - first * self.columns


def widened(stored: Mapping[str, Tensor], how: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names that they have where the model is not quantised.

    Args:
        stored: as the files hold them.
        how: the `quantization_config` of its config.json, if it has one.

    Returns:
        The tensors, with a `CodedTensor` for each matrix that is quantised; or `stored`, where one of them cannot be
        read.
    """
    found = None if how is None else _joined(stored, how)
    return found if isinstance(found, dict) else dict(stored)


def unread(stored: Mapping[str, Tensor], how: Mapping[str, Any]) -> str | None:
    """What of a quantised checkpoint cannot be read; None where all can. Arguments as of `widened`."""
    found = _joined(stored, how)
    return found if isinstance(found, str) else None


def _joined(stored: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor] | str:
    """As `widened`; or what cannot be read."""
    try:
        read = _reader(how)
    except _DAMAGED:
        read = None
    if read is None:
        return "quantization_config in config.json"
    parts = _PARTS[how["quant_method"]]
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        stem, _, last = name.rpartition(".")
        if last == parts[0]:
            try:
                matrix = read(f"{stem}.weight", {part: stored.get(f"{stem}.{part}") for part in parts})
            except _DAMAGED:
                matrix = None
            if matrix is None:
                return f"matrix {stem}.weight"
            found[matrix.name] = matrix
        elif f"{stem}.{parts[0]}" not in stored or last == "bias":
            found[name] = tensor
        elif last not in parts:
            return f"tensor {name}"
    # Beside them others can be quantised in another way.
    left = (name for name, tensor in found.items() if tensor.dtype not in STORAGE or name.endswith("_scale"))
    other = next(left, None)
    return found if other is None else f"tensor {other}"


def _reader(how: Mapping[str, Any]) -> _Read | None:
    """What reads the matrices of a checkpoint that is quantised so; None where there is no such."""
    method = how.get("quant_method")
    if method == "compressed-tensors":
        groups = how["config_groups"].values()
        turned_or_rounded = how.get("transform_config") or any(group.get("input_activations") for group in groups)
        kinds = {(each["num_bits"], each.get("symmetric", True)) for each in (group["weights"] for group in groups)}
        plain = how.get("format") == "pack-quantized" and not turned_or_rounded
        return (lambda name, parts: _compressed(name, parts, kinds & _PACKED)) if plain else None
    if method == "gptq":
        form = how.get("checkpoint_format") or "gptq"
        bits = how.get("bits")
        if form not in {"gptq", "gptq_v2"} or bits not in {4, 8} or how.get("pack_dtype") not in {None, "int32"}:
            return None
        return lambda name, parts: _gptq(name, parts, bits, less=1 if form == "gptq" else 0)
    if method == "torchao":
        (kind,) = how["quant_type"].values()
        held = _TORCHAO[kind["_type"]](kind["_data"])
        return lambda name, parts: _torchao(name, parts, held)
    if method == "awq" and how.get("bits") == 4 and str(how.get("version", "gemm")).lower() == "gemm":
        return _awq
    return None


def _compressed(name: str, parts: Mapping[str, Tensor | None], kinds: Set[tuple[int, bool]]) -> CodedTensor | None:
    """A matrix of compressed-tensors' "pack-quantized": words along rows, with half of the range added.

    Zero points, with half of the range added as well, lie in words along columns. `kinds` are the bits that there can
    be, and whether they are symmetric, without zero points.
    """
    packed = parts["weight_packed"]
    scale = parts["weight_scale"]
    shape = parts["weight_shape"]
    zero = parts["weight_zero_point"]
    if packed is None or scale is None or shape is None or not _are_words(packed, zero):
        return None
    rows, columns = (int(size) for size in mapped(shape).reshape(-1))
    bits = packed.shape[1] * 32 // max(columns, 1)
    groups = _groups(scale, rows, columns)
    if (bits, zero is None) not in kinds or packed.shape != (rows, -(-columns * bits // 32)) or not groups:
        return None
    if zero is not None and zero.shape != (-(-rows * bits // 32), groups):
        return None
    half = 1 << (bits - 1)
    zeros = None if zero is None else unpacked(mapped_words(zero).T, bits).T[:rows].astype(np.int16) - half

    def read(first: int, end: int) -> Rows:
        codes = unpacked(mapped_words(packed)[first:end], bits)[:, :columns].astype(np.int16) - half
        if zeros is not None:
            codes -= np.repeat(zeros[first:end], columns // groups, axis=1)
        return Rows(codes, _of_rows(widen(mapped(scale)), groups, first, end))

    return _coded(name, packed, (rows, columns), columns // groups, _signed(bits, zeros), read)


def _torchao(name: str, parts: Mapping[str, Tensor | None], bits: int) -> CodedTensor | None:
    """A matrix of torchao's: a byte an integer, whatever its bits, and zero points that are integers themselves."""
    codes = parts["_weight_qdata"]
    scale = parts["_weight_scale"]
    zero = parts["_weight_zero_point"]
    if codes is None or scale is None or codes.dtype != "I8" or not 1 <= bits <= 8:
        return None
    rows, columns = codes.shape
    groups = _groups(scale, rows, columns)
    if not groups or (zero is not None and (zero.dtype, zero.shape) != ("I8", scale.shape)):
        return None
    zeros = None if zero is None else mapped(zero).astype(np.int16)

    def read(first: int, end: int) -> Rows:
        found = mapped(codes)[first:end].astype(np.int16)
        if zeros is not None:
            found -= np.repeat(_of_rows(zeros, groups, first, end), columns // groups, axis=1)
        return Rows(found, _of_rows(widen(mapped(scale)), groups, first, end))

    return _coded(name, codes, (rows, columns), columns // groups, _signed(bits, zeros), read)


def _groups(scale: Tensor, rows: int, columns: int) -> int:
    """How many groups a row has by its scales, one for each or one for all; 0 where they do not fit."""
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    fits = scale.dtype in STORAGE and scale.elements in {rows * groups, 1} and groups and columns % groups == 0
    return groups if fits else 0


def _of_rows(of_groups: Array, groups: int, first: int, end: int) -> Array:
    """Scales or zero points `[end - first, groups]` of rows; there may be one for all."""
    found = of_groups.reshape(-1, groups)
    return found[first:end] if len(found) > 1 else np.repeat(found, end - first, axis=0)


def _signed(bits: int, zeros: Integers | None) -> tuple[int, int]:
    """Between which integers of so many bits are, less their zero points."""
    half = 1 << (bits - 1)
    lowest, highest = (0, 0) if zeros is None else (int(zeros.min()), int(zeros.max()))
    return -half - highest, half - 1 - lowest


def _gptq(name: str, parts: Mapping[str, Tensor | None], bits: int, *, less: int) -> CodedTensor | None:
    """A matrix of GPTQ's, turned: words along its columns, of which rows are made here.

    Zero points are stored `less` by so much. It is added to whole words, as it was taken from them: a zero point of 0
    has borrowed from the next.
    """
    turned = _turned(parts)
    if turned is None:
        return None
    packed, scale, zero = turned
    order = parts["g_idx"]
    groups, rows = scale.shape
    columns = packed.shape[0] * 32 // bits
    words = -(-rows * bits // 32)
    if packed.shape[1] != rows or zero.shape != (groups, words) or not groups or columns % groups:
        return None
    plain = np.arange(columns) // (columns // groups)
    group_of = plain if order is None else mapped(order).astype(np.int64)
    if group_of.shape != plain.shape or group_of.min() < 0 or group_of.max() >= groups:
        return None
    neighbours = np.array_equal(group_of, plain)
    of_each = np.uint32(less * (0xFFFFFFFF // ((1 << bits) - 1)))

    def zeros() -> Integers:
        return unpacked(mapped_words(zero) + of_each, bits)[:, :rows].astype(np.int16)

    def read(first: int, end: int) -> Rows:
        codes = unpacked(mapped_words(packed)[:, first:end].T, bits).astype(np.int16)
        codes -= zeros()[group_of, first:end].T
        scales = widen(mapped(scale)[:, first:end].T.copy())
        return Rows(codes, scales if neighbours else scales[:, group_of])

    bounds = -int(zeros().max()), (1 << bits) - 1 - int(zeros().min())
    return _coded(name, packed, (rows, columns), columns // groups if neighbours else 1, bounds, read)


def _awq(name: str, parts: Mapping[str, Tensor | None]) -> CodedTensor | None:
    """A matrix of AWQ's "gemm", turned: words along its rows, in an order of their own, with zero points."""
    turned = _turned(parts)
    if turned is None:
        return None
    packed, scale, zero = turned
    groups, rows = scale.shape
    columns = packed.shape[0]
    if packed.shape[1] * 8 != rows or zero.shape != (groups, rows // 8) or not groups or columns % groups:
        return None

    def between(words: Tensor, first: int, end: int) -> Integers:
        part = unpacked(mapped_words(words)[:, first // 8 : -(-end // 8)], 4)
        ordered = part.reshape(len(part), -1, 8)[:, :, _AWQ_ORDER].reshape(len(part), -1)
        return ordered[:, first % 8 :][:, : end - first].astype(np.int16)

    def read(first: int, end: int) -> Rows:
        codes = between(packed, first, end) - np.repeat(between(zero, first, end), columns // groups, axis=0)
        return Rows(codes.T, widen(mapped(scale)[:, first:end].T.copy()))

    zeros = between(zero, 0, rows)
    return _coded(name, packed, (rows, columns), columns // groups, (-int(zeros.max()), 15 - int(zeros.min())), read)


def _turned(parts: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Integers, scales `[groups, rows]` and zero points of a matrix that lies turned; None where one is not so."""
    packed = parts["qweight"]
    scale = parts["scales"]
    zero = parts["qzeros"]
    if packed is None or scale is None or zero is None or scale.dtype not in STORAGE or len(scale.shape) != 2:
        return None
    return (packed, scale, zero) if _are_words(packed, zero) else None


def _coded(
    name: str,
    codes: Tensor,
    shape: tuple[int, int],
    group_size: int,
    bounds: tuple[int, int],
    read: Callable[[int, int], Rows],
) -> CodedTensor:
    size = math.prod(shape) * STORAGE["F32"].itemsize
    return CodedTensor(name, codes.file, "F32", shape, 0, size, group_size, *bounds, read)


def _are_words(*tensors: Tensor | None) -> bool:
    """Whether tensors, as far as they are there, are matrices of words."""
    return all(tensor is None or (tensor.dtype == "I32" and len(tensor.shape) == 2) for tensor in tensors)


def mapped(tensor: Tensor) -> Array:
    """A tensor as it lies in its file; bfloat16 as its bits in uint16."""
    types = {**STORAGE, "I8": "i1", "I32": "<i4", "I64": "<i8"}
    return np.memmap(tensor.file, types[tensor.dtype], "r", tensor.offset, tensor.shape)


def mapped_words(tensor: Tensor) -> Words:
    """A matrix of words as it lies in its file."""
    words: Words = mapped(tensor).view(np.uint32)
    return words


def unpacked(words: Words, bits: int) -> npt.NDArray[np.uint8]:
    """The integers, `[rows, words * 32 / bits]`, that words `[rows, words]` hold, the first in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return found.astype(np.uint8).reshape(len(words), -1)

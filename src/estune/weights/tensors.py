"""Tensors in safetensors files: where each lies, and its elements, read in bounded memory.

Reads the format directly (eight bytes of header length, a JSON header, raw little-endian data), so that no torch is
needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError

RUN_LENGTH = 1 << 20  # elements read, changed and written at a time
STORAGE: dict[str, Any] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PACKED = "packed"
"""In the place of a type: integers and their scales, whose values are float32 to who reads them."""
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of an element, by safetensors' name of a type. Types of less than a byte are left out."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor of a checkpoint lies."""

    name: str
    file: Path
    dtype: str  # safetensors' name: F32, BF16, F16, I64, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size: int  # in bytes

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Its last dimension, where it has more than one: all others count rows."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def read(self, start: int = 0, count: int | None = None) -> npt.NDArray[np.float32]:
        """Elements `start .. start + count - 1`, row-major, widened to float32 (exact), `[count]`.

        Raises:
            EstuneError: as `stored`.
        """
        return widen(self.stored(start, count))

    def stored(self, start: int = 0, count: int | None = None) -> Array:
        """The same elements in the type that they are stored in, `[count]`; bfloat16 comes as its bits in uint16.

        Raises:
            EstuneError: for a type other than float32, bfloat16 and float16.
        """
        if self.dtype not in STORAGE:
            raise EstuneError(
                f"{self.file}: tensor {self.name} is stored as {self.dtype}, not as one of {', '.join(STORAGE)}; "
                "load the model with dtype=torch.float32 and save it with save_pretrained"
            )
        stored = STORAGE[self.dtype]
        count = self.elements - start if count is None else count
        found: Array = np.fromfile(self.file, stored, count, offset=self.offset + start * stored.itemsize)
        return found

    def runs(self) -> Iterator[Array]:
        """All elements as `stored` gives them, a few MiB at a time."""
        for start in range(0, self.elements, RUN_LENGTH):
            yield self.stored(start, min(RUN_LENGTH, self.elements - start))

    def raw(self) -> Iterator[bytes]:
        """The stored bytes, a few MiB at a time."""
        with self.file.open("rb") as f:
            f.seek(self.offset)
            left = self.size
            while left:
                block = f.read(min(left, 4 * RUN_LENGTH))
                if not block:
                    raise EstuneError(f"{self.file}: the file ends inside tensor {self.name}; copy it again")
                left -= len(block)
                yield block


def widen(stored: Array) -> npt.NDArray[np.float32]:
    """Stored elements `[...]` as float32 `[...]`. bfloat16 comes as its bits in uint16."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """float32 values as stored elements, rounded to nearest, ties to even.

    Args:
        values: `[...]`, C-contiguous.
        dtype: safetensors' name of the type: F32, F16, or BF16, whose bits come as uint16.
    """
    if dtype == "BF16":
        bits = values.view(np.uint32)
        parity = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + parity) >> np.uint32(16)).astype(np.uint16)
    stored: Array = values.astype(STORAGE[dtype], copy=False)
    return stored


def stored_type(dtype: str) -> str:
    """safetensors' name of the type in which elements that are stored as `dtype`, a name or `PACKED`, are read."""
    return "F32" if dtype == PACKED else DTYPES[dtype]


def convert(stored: Array, dtype: str) -> Array:
    """Stored elements in another type, rounded to nearest; in their own type, the same bits.

    Args:
        stored: `[...]`, C-contiguous; bfloat16 as its bits in uint16.
        dtype: as `narrow` takes it.
    """
    return stored if stored.dtype == STORAGE[dtype] else narrow(widen(stored), dtype)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        EstuneError: it is not such a file, or damaged.
    """
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length)) if 0 < length < 1 << 28 else None
        entries = {k: v for k, v in header.items() if k != "__metadata__"}  # type: ignore[union-attr]
        tensors = {name: _tensor(name, file, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise EstuneError(
            f"{file} is not a safetensors file: its header cannot be read; copy or save it again"
        ) from error
    _check_extents(file, 8 + length, tensors.values())
    return tensors


def _tensor(name: str, file: Path, entry: dict[str, Any], data: int) -> Tensor:
    """A tensor by its entry in a header; data begin at byte `data` of the file. Raises what a bad entry leads to."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = entry["dtype"]
    if not all(isinstance(n, int) and n >= 0 for n in (begin, end - begin, *shape)) or not isinstance(dtype, str):
        raise ValueError
    if dtype in _BYTES and end - begin != math.prod(shape) * _BYTES[dtype]:
        raise ValueError
    return Tensor(name, file, dtype, shape, data + begin, end - begin)


def _check_extents(file: Path, data: int, tensors: Iterable[Tensor]) -> None:
    """Check that tensors fill a file from byte `data` to its end: one after another, without gap or overlap.

    Raises:
        EstuneError: they do not, as in a file that was cut short.
    """
    position = data
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if tensor.offset != position:
            how = "overlaps the one before" if tensor.offset < position else "leaves a gap"
            raise EstuneError(f"{file}: tensor {tensor.name} {how} in the file; copy or save it again")
        position += tensor.size
    size = file.stat().st_size
    if size != position:
        how = "was cut short" if size < position else "holds more than its header tells"
        raise EstuneError(f"{file} {how}: it has {size:,} bytes, by its header {position:,}; copy it again")

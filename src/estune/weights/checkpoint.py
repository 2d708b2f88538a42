"""Hugging Face checkpoints on disk, read and written tensor by tensor in bounded memory.

Reads and writes the safetensors format directly (eight bytes of header length, a JSON header, raw little-endian data):
a fine-tuned checkpoint can then be streamed without an engine, without torch and without ever holding a whole tensor.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError
from estune.files import replacing
from estune.weights import adapters
from estune.weights.locate import INDEX, SINGLE, companions, locate, weight_files

RUN_LENGTH = 1 << 20  # elements read, changed and written at a time
_STORAGE: dict[str, Any] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
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
        if self.dtype not in _STORAGE:
            raise EstuneError(
                f"{self.file}: tensor {self.name} is stored as {self.dtype}, not as one of {', '.join(_STORAGE)}; "
                "load the model with dtype=torch.float32 and save it with save_pretrained"
            )
        stored = _STORAGE[self.dtype]
        count = self.elements - start if count is None else count
        found: Array = np.fromfile(self.file, stored, count, offset=self.offset + start * stored.itemsize)
        return found

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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: `config.json` and one or more safetensors files, or an adapter in PEFT's format."""

    path: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        by_file = {file: _read_header(file) for file in weight_files(self.path)}
        return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}

    @property
    def under(self) -> Checkpoint | None:
        """The checkpoint of the model that this one is an adapter of; None where it is a model itself."""
        if not adapters.is_adapter(self.path):
            return None
        named = adapters.model_under(self.path)
        if os.path.isabs(named) and not os.path.exists(named):
            raise EstuneError(
                f"{self.path} is an adapter of {named}, which is not there: say in its {adapters.CONFIG}, "
                "as base_model_name_or_path, where it is now"
            )
        return Checkpoint(locate(named))

    def type_of(self, names: Iterable[str]) -> str | None:
        """The type that most elements of these tensors are stored in; None if `write` does not take it."""
        elements: Counter[str] = Counter()
        for name in names:
            elements[self.tensors[name].dtype] += self.tensors[name].elements
        ((most, _),) = elements.most_common(1)
        return next((dtype for dtype, stored in DTYPES.items() if stored == most), None)

    def content_hash(self) -> str:
        """A BLAKE2b hash of names, types, shapes and bytes of all tensors, however they are spread over files.

        An adapter's holds that of the model under it.
        """

        def digest(tensor: Tensor) -> bytes:
            h = hashlib.blake2b(digest_size=16)
            for block in tensor.raw():
                h.update(block)
            return h.digest()

        tensors = [self.tensors[name] for name in sorted(self.tensors)]
        total = hashlib.blake2b(digest_size=16)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            for tensor, d in zip(tensors, threads.map(digest, tensors), strict=True):
                total.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode() + d)
        if (under := self.under) is not None:
            total.update(under.content_hash().encode())
        return total.hexdigest()

    def write(
        self,
        target: Path,
        trained: dict[str, Callable[[], Iterator[Array]]],
        dtype: str,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint like this one, with `trained` tensors replaced and stored as `dtype`.

        The other files that a model needs (`COMPANIONS`) are copied.

        Args:
            target: directory to make; it appears only when it is complete. An existing one is replaced.
            trained: for each replaced tensor, a function that gives its elements in row-major runs, `[elements]` each:
                float32, float16 or bfloat16's bits (uint16).
            dtype: float32, bfloat16 or float16.
            verify: called when all is written; if it raises, nothing appears.
        """
        with replacing(target) as folder:
            folder.mkdir()
            by_file: dict[str, list[Tensor]] = {}
            for tensor in self.tensors.values():
                by_file.setdefault(tensor.file.name, []).append(tensor)
            size = sum(_write_file(folder / f, ts, trained, DTYPES[dtype]) for f, ts in by_file.items())
            if set(by_file) not in ({SINGLE}, {adapters.WEIGHTS}):
                weight_map = {tensor.name: file for file, tensors in by_file.items() for tensor in tensors}
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for file in self._companions():
                shutil.copy(file, folder / file.name)
            if not adapters.is_adapter(self.path):  # with it, transformers would look for a whole model there
                (folder / "config.json").write_text(self._config(dtype))
            verify()

    def wrote(self, target: Path, trained: Collection[str], dtype: str) -> bool:
        """Whether a directory holds all that `write` puts there; the values of tensors are not compared.

        Args:
            target, dtype: as for `write`.
            trained: names of the tensors that were replaced.
        """
        try:
            found = Checkpoint(target).tensors
            ends: dict[Path, int] = {}
            for tensor in found.values():
                ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.size)
            stored = {
                name: (t.file.name, DTYPES[dtype] if name in trained else t.dtype, t.shape)
                for name, t in self.tensors.items()
            }
            return (
                {name: (t.file.name, t.dtype, t.shape) for name, t in found.items()} == stored
                and all(file.stat().st_size == end for file, end in ends.items())
                and (adapters.is_adapter(self.path) or (target / "config.json").read_text() == self._config(dtype))
                and all(_is_copy(file, target / file.name) for file in self._companions())
            )
        except (OSError, ValueError):  # EstuneError is a ValueError
            return False

    def _companions(self) -> list[Path]:
        """The files that are copied as they are: all companions but `config.json`."""
        return [file for file in companions(self.path) if file.name != "config.json"]

    def _config(self, dtype: str) -> str:
        """Text of `config.json` of a checkpoint that is stored as `dtype`."""
        config = json.loads((self.path / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        return json.dumps(config, indent=2) + "\n"


def _is_copy(file: Path, copy: Path) -> bool:
    """Whether two files beside weights say the same; the model under an adapter may lie elsewhere."""
    if file.name == adapters.CONFIG:
        return adapters.placeless(file) == adapters.placeless(copy)
    return filecmp.cmp(file, copy, shallow=False)


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
    stored: Array = values.astype(_STORAGE[dtype], copy=False)
    return stored


def convert(stored: Array, dtype: str) -> Array:
    """Stored elements in another type, rounded to nearest; in their own type, the same bits.

    Args:
        stored: `[...]`, C-contiguous; bfloat16 as its bits in uint16.
        dtype: as `narrow` takes it.
    """
    return stored if stored.dtype == _STORAGE[dtype] else narrow(widen(stored), dtype)


def _read_header(file: Path) -> dict[str, Tensor]:
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


def _write_file(
    file: Path, tensors: list[Tensor], trained: dict[str, Callable[[], Iterator[Array]]], dtype: str
) -> int:
    """Write one safetensors file; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for t in tensors:
        size = t.elements * _STORAGE[dtype].itemsize if t.name in trained else t.size
        stored = dtype if t.name in trained else t.dtype
        header[t.name] = {"dtype": stored, "shape": t.shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            if t.name not in trained:
                f.writelines(t.raw())
                continue
            for run in trained[t.name]():
                f.write(convert(run, dtype).tobytes())
    return position

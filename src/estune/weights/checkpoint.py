"""Hugging Face checkpoints on disk, read and written tensor by tensor in bounded memory.

Reads and writes the safetensors format directly (eight bytes of header length, a JSON header, raw little-endian data):
a fine-tuned checkpoint can then be streamed without an engine, without torch and without ever holding a whole tensor.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from estune.errors import EstuneError
from estune.files import replacing
from estune.weights import adapters
from estune.weights.coded import CodedTensor, widened
from estune.weights.grid import Grid
from estune.weights.locate import INDEX, SINGLE, companions, is_copied, locate, weight_files
from estune.weights.packed import Entry, packed, packs, settings
from estune.weights.quantized import how_quantized, without
from estune.weights.tensors import DTYPES, PACKED, STORAGE, Array, Tensor, convert, read_header, stored_type


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: `config.json` and one or more safetensors files, or an adapter in PEFT's format."""

    path: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name. A matrix that is quantised is one, where its integers can be read (`coded.py`)."""
        return widened(self.stored, how_quantized(self.path))

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """All tensors by name, as the files hold them."""
        by_file = {file: read_header(file) for file in weight_files(self.path)}
        return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}

    @property
    def under(self) -> Checkpoint | None:
        """The checkpoint of the model that this one is an adapter of; None where it is a model itself."""
        if not adapters.is_adapter(self.path):
            return None
        named, revision = adapters.model_under(self.path)
        if revision and not os.path.exists(named):  # at the hub; or a directory that another machine has, or had
            named = revision if is_copied(revision) else f"{named}@{revision}"
        if os.path.isabs(named) and not (os.path.exists(named) or is_copied(named)):
            raise EstuneError(
                f"{self.path} is an adapter of {named}, which is not there: say in its {adapters.CONFIG}, "
                "as base_model_name_or_path, where it is now"
            )
        return Checkpoint(locate(named))

    def type_of(self, names: Iterable[str]) -> str | None:
        """The type that most elements of these tensors are stored in; None if `write` does not take it."""
        elements: Counter[str] = Counter()
        for name in names:
            tensor = self.tensors[name]
            elements[PACKED if isinstance(tensor, CodedTensor) else tensor.dtype] += tensor.elements
        ((most, _),) = elements.most_common(1)
        if most == PACKED:
            return PACKED
        return next((dtype for dtype, stored in DTYPES.items() if stored == most), None)

    def content_hash(self) -> str:
        """A BLAKE2b hash of names, types, shapes and bytes of all stored tensors, however they are spread over files.

        An adapter's holds that of the model under it.
        """

        def digest(tensor: Tensor) -> bytes:
            h = hashlib.blake2b(digest_size=16)
            for block in tensor.raw():
                h.update(block)
            return h.digest()

        tensors = [self.stored[name] for name in sorted(self.stored)]
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
        trained: Mapping[str, Callable[[], Iterator[Array]]],
        dtype: str,
        verify: Callable[[], None] = lambda: None,
        *,
        grid: Grid | None = None,
    ) -> None:
        """Write a checkpoint like this one, with `trained` tensors replaced and stored as `dtype`.

        The other files that a model needs (`COMPANIONS`) are copied.

        Args:
            target: directory to make; it appears only when it is complete. An existing one is replaced.
            trained: for each replaced tensor, a function that gives its elements in row-major runs, `[elements]` each:
                float32, float16 or bfloat16's bits (uint16).
            dtype: float32, bfloat16 or float16, or `PACKED`, for elements that are on the grid.
            verify: called when all is written; if it raises, nothing appears.
            grid: of integer weights.
        """
        with replacing(target) as folder:
            folder.mkdir()
            by_file: dict[str, list[Entry]] = {}
            for tensor in self.tensors.values():
                written = _entries(tensor, trained.get(tensor.name), dtype, grid)
                by_file.setdefault(tensor.file.name, []).extend(written)
            for file, entries in by_file.items():
                _write_file(folder / file, entries)
            if set(by_file) not in ({SINGLE}, {adapters.WEIGHTS}):
                size = sum(entry.size for entries in by_file.values() for entry in entries)
                weight_map = {entry.name: file for file, entries in by_file.items() for entry in entries}
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            for companion in self._companions():
                shutil.copy(companion, folder / companion.name)
            if not adapters.is_adapter(self.path):  # with it, transformers would look for a whole model there
                (folder / "config.json").write_text(self._config(trained, dtype, grid))
            verify()

    def wrote(self, target: Path, trained: Collection[str], dtype: str, grid: Grid | None = None) -> bool:
        """Whether a directory holds all that `write` puts there; the values of tensors are not compared.

        Args:
            target, dtype, grid: as for `write`.
            trained: names of the tensors that were replaced.
        """
        try:
            written = Checkpoint(target)
            ends: dict[Path, int] = {}
            for tensor in written.stored.values():
                ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.size)
            stored = {
                name: (t.file.name, stored_type(dtype) if name in trained else t.dtype, t.shape)
                for name, t in self.tensors.items()
            }
            coded = {
                name
                for name, t in self.tensors.items()
                if dtype == PACKED and grid is not None and packs(t, grid, trained=name in trained)
            }
            return (
                {name: (t.file.name, t.dtype, t.shape) for name, t in written.tensors.items()} == stored
                and {name for name, t in written.tensors.items() if isinstance(t, CodedTensor)} == coded
                and all(file.stat().st_size == end for file, end in ends.items())
                and (
                    adapters.is_adapter(self.path)
                    or (target / "config.json").read_text() == self._config(trained, dtype, grid)
                )
                and all(_is_copy(file, target / file.name) for file in self._companions())
            )
        except (OSError, ValueError):  # EstuneError is a ValueError
            return False

    def _companions(self) -> list[Path]:
        """The files that are copied as they are: all companions but `config.json`."""
        return [file for file in companions(self.path) if file.name != "config.json"]

    def _config(self, trained: Collection[str], dtype: str, grid: Grid | None) -> str:
        """Text of `config.json` of a checkpoint that is stored as `dtype`; packed, it is computed with as before."""
        config = without(json.loads((self.path / "config.json").read_text()))
        if dtype == PACKED:
            assert grid is not None
            config["quantization_config"] = settings(self.tensors, trained, grid)
        else:
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
        return json.dumps(config, indent=2) + "\n"


def _is_copy(file: Path, copy: Path) -> bool:
    """Whether two files beside weights say the same; the model under an adapter may lie elsewhere."""
    if file.name == adapters.CONFIG:
        return adapters.placeless(file) == adapters.placeless(copy)
    return filecmp.cmp(file, copy, shallow=False)


def _entries(
    tensor: Tensor, run: Callable[[], Iterator[Array]] | None, dtype: str, grid: Grid | None
) -> Iterator[Entry]:
    """What a tensor is written as, with other elements by `run`, or with its own; arguments as of `write`."""
    if dtype == PACKED and grid is not None and packs(tensor, grid, trained=run is not None):
        return packed(tensor, run or tensor.runs, grid)
    if run is None:
        return iter([Entry(tensor.name, tensor.dtype, tensor.shape, tensor.size, tensor.raw)])
    stored = stored_type(dtype)
    size = tensor.elements * STORAGE[stored].itemsize
    return iter(
        [Entry(tensor.name, stored, tensor.shape, size, lambda: (convert(part, stored).tobytes() for part in run()))]
    )


def _write_file(file: Path, entries: Sequence[Entry]) -> None:
    """Write one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.size
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            f.writelines(entry.raw())

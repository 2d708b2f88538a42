"""Hugging Face checkpoints on disk, read and written tensor by tensor in bounded memory.

Reads and writes the safetensors format directly (eight bytes of header length, a JSON header, raw little-endian data):
a fine-tuned checkpoint can then be streamed without an engine, without torch and without ever holding a whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError
from estune.files import replacing

EMBEDDED = {"tiny": Path(__file__).parent / "models" / "tiny"}
"""Models shipped inside the package, by the name a user gives for `model`."""

RUN_LENGTH = 1 << 20  # elements read, changed and written at a time
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
_STORAGE: dict[str, Any] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

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

    def read(self, start: int = 0, count: int | None = None) -> npt.NDArray[np.float32]:
        """Elements `start .. start + count - 1`, row-major, widened to float32 (exact)."""
        stored = _STORAGE[self.dtype]
        count = self.elements - start if count is None else count
        raw = np.fromfile(self.file, stored, count, offset=self.offset + start * stored.itemsize)
        return widen(raw, self.dtype)

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
    """A checkpoint directory: `config.json` and one or more safetensors files."""

    path: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        found: dict[str, Tensor] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            found.update(_read_header(file))
        if not found:
            raise EstuneError(f"{self.path} holds no .safetensors weights: save the model with save_pretrained first")
        return found

    def content_hash(self) -> str:
        """BLAKE2b over names, types, shapes and bytes of all tensors, however they are spread over files."""

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
        return total.hexdigest()

    def write(
        self,
        target: Path,
        trained: dict[str, Callable[[], Iterator[Array]]],
        dtype: str,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        """Write a checkpoint like this one, with `trained` tensors replaced and stored as `dtype`.

        Args:
            target: directory to make; it appears only when it is complete. An existing one is replaced.
            trained: for each replaced tensor, a function giving its elements in row-major runs, float32 or bfloat16
                bits (uint16).
            dtype: float32, bfloat16 or float16.
            verify: called when all is written; if it raises, nothing appears.
        """
        with replacing(target) as folder:
            folder.mkdir()
            for file in sorted({t.file for t in self.tensors.values()}):
                tensors = [t for t in self.tensors.values() if t.file == file]
                _write_file(folder / file.name, tensors, trained, _DTYPES[dtype])
            for file in self.path.iterdir():
                if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and not file.name.startswith("."):
                    shutil.copy(file, folder / file.name)
            config = json.loads((folder / "config.json").read_text())
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            verify()


def locate(model: str | Path) -> Path:
    """Directory of a model given as an embedded name, a local directory or a hub id (downloaded if needed).

    Raises:
        EstuneError: where there is no such model, or the directory holds none.
    """
    path = EMBEDDED.get(str(model), Path(model))
    if not path.exists() and not path.is_absolute() and str(model).count("/") == 1 and not str(model).startswith("."):
        path = _download(str(model))
    if not path.exists():
        names = ", ".join(EMBEDDED)
        raise EstuneError(
            f"model {model}: no such directory; give a directory, a hub id (owner/name) or one of: {names}"
        )
    if not (path / "config.json").is_file():
        kind = "a file" if path.is_file() else "a directory without config.json"
        raise EstuneError(f"model {model} is {kind}, not a checkpoint: give a directory made by save_pretrained")
    return path


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub's library raises a dozen kinds; each means that the model cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EstuneError(
            f"model {model}: neither a local directory nor to be had from the hub ({reason}); check name and network"
        ) from error


def widen(stored: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Stored elements as float32. bfloat16 comes as its bits in uint16."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32, copy=False)


def narrow(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """float32 as stored elements, to nearest, ties to even."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        parity = (bits >> np.uint32(16)) & np.uint32(1)
        return ((bits + np.uint32(0x7FFF) + parity) >> np.uint32(16)).astype(np.uint16)
    stored: Array = values.astype(_STORAGE[dtype], copy=False)
    return stored


def _read_header(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length)) if 0 < length < 1 << 28 else None
        entries = {k: v for k, v in header.items() if k != "__metadata__"}  # type: ignore[union-attr]
        return {
            name: Tensor(name, file, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0], end - begin)
            for name, e in entries.items()
            for begin, end in [e["data_offsets"]]
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EstuneError(
            f"{file} is not a safetensors file: its header cannot be read; copy or save it again"
        ) from error


def _write_file(
    file: Path, tensors: list[Tensor], trained: dict[str, Callable[[], Iterator[Array]]], dtype: str
) -> None:
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
                values = widen(run, "BF16") if run.dtype == np.uint16 else run
                f.write(narrow(values, dtype).tobytes())
        f.flush()
        os.fsync(f.fileno())

"""What the engines ask of the machine's memory."""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from estune.errors import EstuneError

# glibc's mallopt parameters, from malloc.h
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_CACHE_LINE = 64
GPU_CONTEXT = 10**9  # bytes of a process on a GPU: CUDA's context, compiled kernels, workspaces; about
MOST_ENGINES = 4  # on one device; beyond, each waits for the others more than it gains
ORDINARY_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers, as a config lists them, that keep the keys and values of every token."""
LOGITS_BYTES = 3 * 4  # a logit in float32, and what softmax or argmax keeps beside it
GPU_SPARE = 4 << 30
"""Bytes of a GPU, at least, for what vLLM takes beside weights, keys and values: context, graphs and activations."""
GPU_SPARE_SHARE = 4  # and at least one part in so many


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what a decode step frees, for the next step: up to 256 MiB per arena.

    By default it hands tensors of a few hundred KB back to the system at once, and the next step faults their pages in
    again. For 200 completions of the embedded model over its own forward that was 5,000 page faults and 5 to 20% of the
    time; with fused kernels it is some 1,000, which cost nothing that could be measured. Elsewhere than on
    Linux with glibc nothing is done. Holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def give_back_memory() -> None:
    """Let glibc hand back to the system what has been freed, as after a model's weights have become smaller."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that `device` has, whoever uses them now; for the CPU, as many as this process may have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system tells
        machine = 16 << 30
    return min([machine, *group_limits()])


def group_limits(root: Path = Path("/")) -> list[int]:
    """Memory limits, in bytes, of the control groups that this process is in (Linux, versions 1 and 2)."""
    groups = root / "proc/self/cgroup"
    limits = []
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for line in lines:  # cgroups(7): hierarchy:controllers:path, no controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        place, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        group = PurePosixPath(path).relative_to("/")
        for part in (group, *group.parents):  # a container can see its own group as the root
            file = root / "sys/fs/cgroup" / place / part / name
            text = file.read_text().strip() if file.is_file() else "max"
            limits += [int(text)] if text.isdigit() else []
    return limits


def cached_elements(config: Any, parallel: int = 1) -> int:
    """Elements of keys and values that a token leaves in all layers together.

    Layers that keep a state of one size, whatever the length, are counted as if they attended, which is more except for
    the shortest texts. A config that names no heads is counted with as many as its hidden size has room for.

    Args:
        config: a causal language model's.
        parallel: devices that the heads are split over; the elements on one of them are returned.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):  # it refuses to tell what differs from layer to layer
        return sum(_layer_elements(layer, parallel) for layer in text.per_layer_config)
    layers: int = getattr(text, "num_hidden_layers", 0)  # of BLT its parts have some, of which no cache can be made
    return layers * _layer_elements(text, parallel) if layers else 0


def attends_everywhere(config: Any) -> bool:
    """Whether every layer keeps keys and values for each token, by what its config says, and no state of another kind.

    Args:
        config: a causal language model's.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    return bool(heads) and kinds <= ORDINARY_LAYERS and not any("mamba" in name for name in text.to_dict())


def _layer_elements(layer: Any, parallel: int) -> int:
    """Elements that a token leaves in a layer of this config."""
    attention = getattr(layer, "num_attention_heads", None)
    if not attention:
        hidden: int = layer.hidden_size
        return 2 * (hidden // parallel)
    heads: int = getattr(layer, "num_key_value_heads", None) or attention
    width: int = getattr(layer, "head_dim", None) or layer.hidden_size // attention
    return 2 * max(heads // parallel, 1) * width


def known_cache(needed: int, weights: int, allotted: int) -> int | None:
    """Bytes for keys and values on a GPU, if all that can be needed fits there with room to spare.

    vLLM would measure the room by the memory that has gone from the GPU since it started, and count in what another
    engine takes there meanwhile. A size that is known needs no measuring.

    Args:
        needed: bytes of the keys and values of as many full sequences as there can be.
        weights: bytes of live weights on the GPU.
        allotted: bytes of the GPU for this engine, without the base.

    Returns:
        `needed`; None where it may not fit.
    """
    spare = max(GPU_SPARE, allotted // GPU_SPARE_SHARE)
    return needed if weights + needed + spare <= allotted else None


def fitting_rows(memory: int, *, cache: int, vocabulary: int, most: int) -> int:
    """Rows that a decoder takes at once: as many as fit, at most `most`, and one at least.

    Args:
        memory: bytes for a batch.
        cache: bytes of the keys and values of a row.
        vocabulary: logits of a row.
    """
    return max(1, min(most, memory // (cache + LOGITS_BYTES * vocabulary)))


def fitting_engines(memory: int, *, live: int, base: int, rows: int, row: int, share: int) -> int:
    """Engines that one device holds, from 1 to `MOST_ENGINES`, each with its base, and all rows of a step in one batch.

    They are counted by the memory that the device has, not by what is free: the same run must be the same on any day.

    Args:
        memory: bytes of the device.
        live, base: bytes of one engine's weights, and of the base that it keeps there.
        rows: prompts of a step.
        row: bytes of one prompt: its cache and its logits.
        share: a batch may take one part in `share` of what live weights leave, a base one in two.
    """
    for count in range(MOST_ENGINES, 1, -1):
        left = memory // count - live
        if base <= left // 2 and rows * row <= left // share and base + rows * row + GPU_CONTEXT <= left:
            return count
    return 1


@contextmanager
def memory_for(name: str, remedy: str) -> Iterator[None]:
    """If memory runs out within this context, raise an error that says what it was for, and what to do.

    Raises:
        EstuneError: in place of what PyTorch, NumPy or Python raise for a lack of memory.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # PyTorch has a type for it on CUDA, but not on the CPU
        text = " ".join(str(error).split())
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) in _NO_ROOM
        if not known and not _OUT_OF_MEMORY.search(text):
            raise
        asked = _ASKED.search(text)
        total = _TOTAL.search(text)
        size = f"{_readable(asked[1])} more" if asked else "what it needs"
        if total is None and "CUDA" in text:
            has = ""  # no telling which device it was
        else:
            all_of_it = total[1] if total else _readable(str(total_memory(torch.device("cpu"))))
            has = f", the device has {all_of_it} in all"
        raise EstuneError(f"out of memory for {name}: asked for {size}{has}; {remedy}") from error


_NO_ROOM = {errno.ENOMEM, errno.ENOSPC}
_OUT_OF_MEMORY = re.compile(r"out of memory|(can't|[Cc]annot) allocate memory|not enough memory")
_ASKED = re.compile(r"(?:ried to allocate|Unable to allocate) ([\d.]+(?: [KMGTP]iB)?)")
_TOTAL = re.compile(r"total capacity of ([\d.]+ [KMGTP]iB)")


def _readable(size: str) -> str:
    """A number of bytes in GiB; what has a unit is left alone."""
    return f"{int(size) / 2**30:.2f} GiB" if size.isdigit() else size


def aligned_empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array that begins with a cache line, so that no vector of 64 bytes lies across two.

    Attention over a cache that begins elsewhere takes 1.1 times as long, and a matrix unit reads what does at a quarter
    of its speed. It lies on huge pages where NumPy gets them.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    memory = np.empty(size * kind.itemsize + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size * kind.itemsize].view(kind).reshape(shape)

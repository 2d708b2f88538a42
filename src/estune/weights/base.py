"""One base for all replicas of a machine: memory that their processes share, and each one's share of it to update.

The memory is a file without a name, which processes inherit. It is gone when they are, however they end.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from estune.noise.rows import Run
from estune.weights.device_storage import STREAMED_LENGTH


@dataclass(frozen=True, slots=True)
class Share:
    """A replica's share of a base in shared memory. All replicas read the whole base."""

    memory: int  # from `open_memory`: a file descriptor, of the same number in a process that inherits it
    index: int
    count: int

    @property
    def fills(self) -> bool:
        """Whether this replica fills the base for all. Until it has, nobody may perturb."""
        return self.index == 0

    def map(self, size: int) -> npt.NDArray[np.uint8]:
        """Map the shared memory, uint8 `[size]`. It stays as long as any process has it mapped.

        Raises:
            OSError: there is not so much memory.
        """
        os.ftruncate(self.memory, size)  # whoever comes first makes room; to the size that it has, this does nothing
        if self.fills and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.memory, 0, size)  # a lack of memory is an error here, and a signal when it is used
        return np.frombuffer(mmap.mmap(self.memory, size), np.uint8)

    def stretch(self, elements: int) -> tuple[int, int]:
        """First element and end of the share, in a base of `elements` elements."""
        return elements * self.index // self.count, elements * (self.index + 1) // self.count


def open_memory() -> int:
    """A file descriptor of shared memory, which each process closes once it has mapped it.

    Elsewhere than on Linux it is a file on disk.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("estune-base")
    with tempfile.TemporaryFile() as file:  # has lost its name already
        return os.dup(file.fileno())


def share_of(runs: Sequence[Run], share: Share) -> list[Run]:
    """The runs of a replica's share: one stretch of all runs laid end to end, whose ends can lie within runs."""
    first, end = share.stretch(sum(len(run.live) for run in runs))
    found = []
    position = 0
    for run in runs:
        start = max(first - position, 0)
        stop = min(end - position, len(run.live))
        if start < stop:
            found.append(run.part(start, stop))
        position += len(run.live)
    return found


def make_base(
    live: Sequence[Tensor], dtype: torch.dtype | None, *, on_host: bool, share: Share | None = None
) -> list[Tensor]:
    """Copies of weights: beside them, in pinned host memory, or in shared memory.

    Args:
        live: flat tensors, `[elements]` each, all on one device.
        dtype: type of the copies; each tensor's own if None.
        on_host: make them in pinned host memory.
        share: make them in shared memory, which is left as it is unless this replica is the one that fills it.
    """
    shapes = [(t.numel(), dtype or t.dtype) for t in live]
    if share is not None:
        base = _carve(shapes, share.map)
        if not share.fills:
            return base
    elif on_host:
        with torch.cuda.device_of(live[0]):  # type: ignore[no-untyped-call]
            base = _carve(shapes, pinned_bytes)
    else:
        here = [t.device if t.device.type in {"cpu", "cuda"} else "cpu" for t in live]  # where there are kernels
        base = [torch.empty_like(t, dtype=dtype or t.dtype, device=d) for t, d in zip(live, here, strict=True)]
    for source, target in zip(live, base, strict=True):
        for i in range(0, len(source), STREAMED_LENGTH):  # another type on another device needs a copy in between
            target[i : i + STREAMED_LENGTH].copy_(source[i : i + STREAMED_LENGTH])
    return base


def keeps_base_on_host(choice: str, *, base: int, live: int, memory: int) -> bool:
    """Where the base of a model on CUDA lies: True for host memory.

    The memory that is free does not count, so that the same run on the same machine does the same.

    Args:
        choice: the setting, auto, device or host.
        base, live: bytes of the base, and of all the model's live weights.
        memory: bytes that the device has. Half of what live weights leave is for batches.
    """
    return choice == "host" if choice != "auto" else base > (memory - live) // 2


def pinned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Host memory that the device reads and writes by itself, uint8 `[size]`.

    PyTorch's pinned allocator rounds every tensor up to a power of two, which can double the memory that a base takes.
    """
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # pages of its own, as pages are what is pinned
    address = memory.ctypes.data
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(cuda.cudaHostRegister(address, memory.nbytes, 0))
    weakref.finalize(memory, cuda.cudaHostUnregister, address).atexit = False  # the system does it then
    return memory


def _carve(shapes: Sequence[tuple[int, torch.dtype]], allocate: Callable[[int], npt.NDArray[np.uint8]]) -> list[Tensor]:
    """Flat tensors of these lengths and types, one after another in memory from `allocate(bytes)`."""
    sizes = [-(-elements * dtype.itemsize // 256) * 256 for elements, dtype in shapes]
    whole = torch.from_numpy(allocate(sum(sizes)))
    ends = itertools.accumulate(sizes)
    return [
        whole[end - size : end - size + elements * dtype.itemsize].view(dtype)
        for end, size, (elements, dtype) in zip(ends, sizes, shapes, strict=True)
    ]

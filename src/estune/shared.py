"""One base for all replicas of a machine: memory that their processes share, and each one's share of it to update.

The memory is a file without a name, which processes inherit. It is gone when they are, however they end.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Share:
    """A replica's share of a base in shared memory. All replicas read all of it."""

    memory: int  # from `open_memory`: a file descriptor, of the same number in a process that inherits it
    index: int
    count: int

    @property
    def fills(self) -> bool:
        """Whether this replica fills the base, for all. Until it has, nobody may perturb."""
        return self.index == 0

    def map(self, size: int) -> npt.NDArray[np.uint8]:
        """The shared memory, of `size` bytes in every process. It stays while any process has it mapped.

        Raises:
            OSError: there is not so much memory.
        """
        os.ftruncate(self.memory, size)  # whoever comes first makes room; to the size that it has, this does nothing
        if self.fills and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.memory, 0, size)  # a lack of memory is an error here, and a signal when it is used
        return np.frombuffer(mmap.mmap(self.memory, size), np.uint8)

    def stretch(self, elements: int) -> tuple[int, int]:
        """First element and end of the share, of a base of so many elements."""
        return elements * self.index // self.count, elements * (self.index + 1) // self.count


def open_memory() -> int:
    """A file descriptor of shared memory, which each process closes once it has mapped it.

    On other systems than Linux it is a file's.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("estune-base")
    with tempfile.TemporaryFile() as file:  # has lost its name already
        return os.dup(file.fileno())

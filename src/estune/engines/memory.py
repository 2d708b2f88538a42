"""What the engines ask of the machine's memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch

# glibc's mallopt parameters, from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what a decode step frees, for the next step: up to 256 MiB per arena.

    By default it hands tensors of a few hundred KB back to the system at once, and the next step faults their pages in
    again: 5,000 page faults for 200 completions of the embedded model, and 5 to 20% of their time. Elsewhere than on
    Linux with glibc nothing is done. Holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`; for the CPU, what the machine has free."""
    if device.type == "cuda":
        # What PyTorch has reserved and not handed out can be handed out again.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system tells
        return 4 << 30

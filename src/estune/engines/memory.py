"""What the engines ask of the machine's memory."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path, PurePosixPath

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
    groups, limits = root / "proc/self/cgroup", []
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

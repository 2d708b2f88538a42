"""The memory that a process and its children hold, from Linux's /proc.

Memory of their own is counted, and memory that they share with each other, which no limit on a single process sees.
Pages of files are not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


def held_at_most(pid: int) -> int:
    """Bytes that a process and its descendants hold at most: what they share counts for each. Fast."""
    names = ("RssAnon:", "RssShmem:", "VmSwap:")
    return sum(_sum(f"/proc/{member}/status", names) for member in _family(pid))


def held(pid: int) -> int:
    """Bytes that a process and its descendants hold together. Slower; 0 if the system does not tell."""
    names = ("Pss_Anon:", "Pss_Shmem:", "SwapPss:")
    return sum(_sum(f"/proc/{member}/smaps_rollup", names) for member in _family(pid))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for thread in _threads(pid):
        children = _text(f"{thread}/children").split()
        # A thread in `vfork` waits so, and its child is, for this moment, the same memory.
        if children and _text(f"{thread}/stat").rpartition(")")[2].split()[:1] != ["D"]:
            for child in children:
                yield from _family(int(child))


def _threads(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _sum(path: str, names: tuple[str, ...]) -> int:
    return sum(1024 * int(line.split()[1]) for line in _text(path).splitlines() if line.startswith(names))


def _text(path: str) -> str:
    """The text of a file of /proc; empty if its process has ended."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""

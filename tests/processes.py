"""Processes that tests look at, and what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests import warm


def alive(pid: int) -> bool:
    """Whether a process runs: one that is dead, or dead and not yet waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended in the meantime
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and (folder / "comm").read_bytes().strip() != warm.NAME:
            found.append(int(folder.name))
    return found


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether a condition comes to hold in so long; it is waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not in so long.
    """
    assert within(seconds, condition), f"not in {seconds} seconds"

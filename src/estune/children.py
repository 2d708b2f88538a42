"""Processes that end with the one that started them, however that one ends; and the cores that they may use."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(*, with_thread: bool) -> None:
    """End this process as soon as the one that started it is gone, even if that was killed.

    Its standard input must be a pipe to which the parent writes nothing more: the pipe's end is the parent's. Whoever
    reads standard input from now on finds it empty.

    Args:
        with_thread: on Linux, let the kernel kill it too, which reaches it in the middle of a regular expression, where
            no thread of its own could. The kernel does so when the *thread* that started it ends: only for a child
            whose parent's thread waits for it.
    """
    if with_thread:
        die_with_thread()
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_at_end_of, args=(pipe,), daemon=True).start()


def die_with_thread() -> None:
    """On Linux, let the kernel kill this process when the thread that started it ends, even if it is stopped then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def watch_parent() -> None:
    """End this process within a second of the one that started it.

    It is for a process that reads its standard input itself, and whose starter may be a thread that ends before its own
    process does.
    """
    threading.Thread(target=_end_without, args=(os.getppid(),), daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _end_at_end_of(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(0)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

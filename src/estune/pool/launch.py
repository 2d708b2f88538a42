"""Processes for replicas, and one that is launched ahead: it imports what it needs while this process does the same.

Imports no torch, as the process ahead is launched before anything else. The memory of a base that replicas share is
made with it, as a process can inherit only what is there when it starts.
"""

from __future__ import annotations

import atexit
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from estune.config import Config
from estune.files import make_temporary, remove_temporary
from estune.weights.policies import POLICIES

READY_SECONDS = 30.0  # at most, that the one ahead is waited for before anything is measured


class Launched(NamedTuple):
    """A process that serves replicas at `socket` once it has imported what it needs, until its standard input ends."""

    process: subprocess.Popen[bytes]
    folder: Path
    key: bytes
    memory: int | None = None  # file descriptor that it inherits, for a base

    @property
    def socket(self) -> Path:
        """The path of the socket that it serves at, which is there once it does."""
        return self.folder / "s"  # a path that the system allows is short

    def end(self) -> None:
        """Kill it."""
        self.process.kill()  # also one that is stopped
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        remove_temporary(self.folder)


_ahead: list[Launched] = []  # one at most


def launch(inherited: Sequence[int] = ()) -> Launched:
    """A process for a replica: the one ahead if it has inherited the same memory, or else a new one.

    Args:
        inherited: file descriptors that the process inherits.
    """
    if _ahead and list(inherited) == [_ahead[0].memory]:
        return _ahead.pop()
    return _launch(inherited)


def launch_ahead(config: Config) -> None:
    """Launch a process now if there will likely be a second replica on the CPU. `end_ahead` ends one left over."""
    alone = config.workers or config.engine == "vllm" or not POLICIES[config.weights].keeps_base
    elsewhere = config.device not in ("auto", "cpu") or (config.device == "auto" and Path("/dev/nvidiactl").exists())
    cores = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    if _ahead or alone or elsewhere or config.replicas == 1 or cores == "1" or not hasattr(os, "memfd_create"):
        return
    memory = os.memfd_create("estune-base")
    _ahead.append(_launch([memory])._replace(memory=memory))
    atexit.register(end_ahead)


def memory_ahead() -> int | None:
    """The descriptor of the memory that the process ahead has inherited, for one pool to use and close, or None."""
    return _ahead[0].memory if _ahead else None


def await_ahead() -> None:
    """Wait until the process ahead has imported what it needs, as its imports would disturb a measurement."""
    until = time.monotonic() + READY_SECONDS
    while _ahead and not _ahead[0].socket.exists() and _ahead[0].process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def end_ahead() -> None:
    """End the process ahead, if nobody has taken it. Its memory, which is empty, stays open: a pool may have it."""
    while _ahead:
        _ahead.pop().end()


def _launch(inherited: Sequence[int]) -> Launched:
    folder = make_temporary("replica")
    key = secrets.token_bytes(16)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "estune.pool.process", str(folder / "s")],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the trainer alone
        pass_fds=inherited,
    )
    assert process.stdin is not None
    process.stdin.write(key.hex().encode() + b"\n")
    process.stdin.flush()
    return Launched(process, folder, key)

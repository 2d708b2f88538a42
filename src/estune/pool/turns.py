"""Engines that start on one GPU do so in turn.

vLLM counts what memory has gone from a GPU between two looks, and takes what others load meanwhile for its own.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from estune.config import Config
from estune.pool.waiting import FIRST_WORD, told_while


@contextmanager
def in_turn(gpus: Sequence[str], first: float = FIRST_WORD) -> Iterator[None]:
    """Hold GPUs while an engine starts on them; say now and then that it waits if another process holds one.

    A process that ends, in whatever way, holds nothing any more.

    Args:
        gpus: names of the GPUs, the same in all processes of this machine; none for an engine on a CPU.
        first: seconds until it first says that it waits.
    """
    with ExitStack() as held:
        for gpu in sorted(set(gpus)):  # in one order for all, so that no two wait for each other
            held.enter_context(_alone(gpu, first))
        yield


def gpus_of(config: Config) -> list[str]:
    """The identifiers (UUID) of the GPUs that an engine of vLLM takes: the first that this process sees."""
    import torch

    from estune.weights.device import chosen_device

    if chosen_device(config.device).type != "cuda":
        return []
    count = min(config.gpus_per_worker, torch.cuda.device_count())
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]


@contextmanager
def _alone(gpu: str, first: float) -> Iterator[None]:
    file = _open(Path(tempfile.gettempdir()) / f"estune-gpu-{gpu}.lock")
    try:
        with told_while(f"waiting for another engine to have started on GPU {gpu}", first):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # for processes too that were forked meanwhile, and have the file open
        os.close(file)


def _open(path: Path) -> int:
    """A file that all users can lock, for which it is enough that they may read it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with suppress(FileNotFoundError):
            return os.open(path, flags)  # where it is another user's, asking to create it would be refused
        with suppress(FileExistsError):  # somebody was faster
            file = os.open(path, flags | os.O_CREAT | os.O_EXCL)
            os.fchmod(file, 0o644)  # whatever this user's mask forbids
            return file

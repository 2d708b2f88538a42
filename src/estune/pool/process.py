"""A replica in a process of its own.

On a CPU the threads of one process would wait for each other at the interpreter's lock, between thousands of small
operations a second. The standard library's managers do the talking: calls of the proxy run in the process. A process of
our own, instead of `multiprocessing`'s, leaves the user's main module alone, and Ctrl-C to the trainer.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from estune.children import end_with_parent
from estune.completion import Completion, Sampling
from estune.config import Config
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.pool.base import Evaluated
from estune.pool.replica import Replica
from estune.weights.base import Share

START_SECONDS = 120


class _Manager(BaseManager):
    pass


def _open(config: Config, share: Share | None, perturbs: bool) -> Replica:
    try:
        return Replica(config, share, perturbs=perturbs)
    finally:
        if share is not None:
            os.close(share.memory)  # as the parent does: it is mapped, or never will be


_Manager.register("Replica", _open, exposed=("evaluate", "generate", "apply", "load"))


class WorkerProcess:
    """Starts a process with a `Replica`, and passes calls on to it. The process ends with this one, however it ends.

    Every call raises what the replica raised, or `EstuneError` if the process is gone.

    Args:
        share: of a base that it shares with other processes; the process inherits the memory.
    """

    def __init__(self, share: Share | None = None) -> None:
        self._share = share
        self._folder = Path(tempfile.mkdtemp(prefix="estune-"))
        self._key = secrets.token_bytes(16)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "estune.pool.process", str(self._folder / "socket")],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the trainer alone
            pass_fds=() if share is None else (share.memory,),
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._key.hex().encode() + b"\n")
        self._process.stdin.flush()
        self._replica: Any = None

    def open(self, config: Config, perturbs: bool = True) -> None:
        """Wait for the process and let it load the model."""
        manager = _Manager(str(self._folder / "socket"), self._key)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                manager.connect()
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._gone() from None
                time.sleep(0.02)
        self._replica = self._call(manager.Replica, config, self._share, perturbs)  # type: ignore[attr-defined]

    def evaluate(
        self, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """As `Replica.evaluate`."""
        found: Evaluated = self._call(self._replica.evaluate, member, sigma, prompt_ids, sampling)
        return found

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `Replica.generate`."""
        found: list[Completion] = self._call(self._replica.generate, prompt_ids, sampling)
        return found

    def apply(self, update: Update) -> int:
        """As `Replica.apply`."""
        found: int = self._call(self._replica.apply, update)
        return found

    def load(self, checkpoint: Path) -> None:
        """As `Replica.load`."""
        self._call(self._replica.load, checkpoint)

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (EOFError, ConnectionError) as error:
            raise self._gone() from error

    def _gone(self) -> EstuneError:
        try:
            how = f"ended with code {self._process.wait(2)} (-9 is often a lack of memory)"
        except subprocess.TimeoutExpired:
            how = "does not answer"
        return EstuneError(f"a replica's process {how}; nothing is lost: resume, or use fewer --replicas")


def main() -> None:
    """Serve a replica at the socket named on the command line until standard input ends."""
    key = bytes.fromhex(sys.stdin.readline())
    end_with_parent(with_thread=False)
    _Manager(sys.argv[1], key).get_server().serve_forever()


if __name__ == "__main__":
    main()

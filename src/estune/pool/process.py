"""A generator or a replica in a process of its own.

On a CPU the threads of one process would wait for each other at the interpreter's lock, between thousands of small
operations a second. The standard library's managers do the talking: calls of the proxy run in the process. A process of
our own, instead of `multiprocessing`'s, leaves the user's main module alone, and Ctrl-C to the trainer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from estune.children import die_with_thread, end_with_parent
from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.progress import OWN, Counts, Progress, together
from estune.es.strategy import Member, Update
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.generator import open_generator
from estune.pool.launch import Launched, launch
from estune.pool.replica import Replica
from estune.weights.base import Share

COUNTS = "progress"  # the file in a process's folder in which it counts what it has done


class _Manager(BaseManager):
    pass


def _open(config: Config, share: Share | None) -> Replica:
    try:
        return Replica(config, share)
    finally:
        if share is not None:
            os.close(share.memory)  # it is mapped, or never will be


_Manager.register("Generator", open_generator, exposed=("generate",))
_Manager.register("Replica", _open, exposed=("take", "complete_each", "generate", "apply", "load", "rebuild"))


class GeneratorProcess:
    """A process with a `Generator`, to which calls are passed on. If the process is lost, it can be opened again.

    The process ends with this one, however this one ends, and with the thread that opened it. Every call raises what
    the generator raised, or `Lost` if the process is gone or does not answer in time; it has been killed then.

    Args:
        config: the settings of its generator.
        deadlines: how long to wait for answers; shared by the replicas of a pool.
        inherited: file descriptors that the process inherits.
    """

    def __init__(self, config: Config, *, deadlines: Deadlines | None = None, inherited: Sequence[int] = ()) -> None:
        self._config = config
        self._deadlines = deadlines or Deadlines(config.worker_timeout)
        self.inherited = inherited
        """Descriptors of memory that its processes are given."""
        self._lock = threading.Lock()
        self._closed = False
        self._launched: Launched | None = None
        self._late: float | None = None  # seconds that it was waited for in vain
        self._counts = Counts()
        self._earlier = Progress()  # what processes that were lost had done
        self._proxy: Any = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, or the last one that there was."""
        return self._launched and self._launched.process

    def __str__(self) -> str:
        return f"the replica of process {self.process.pid}" if self.process else "a replica"

    def open(self) -> None:
        """Start a process, in the place of an earlier one, and let it load the model.

        Raises:
            Lost: it ended before it was ready.
        """
        manager = self._start()

        def load() -> Any:
            while True:
                try:
                    manager.connect()
                    break
                except OSError:
                    if self.process is None or self.process.poll() is not None:
                        raise ConnectionError from None
                    time.sleep(0.02)
            return self._make(manager)

        self._proxy = self._call("open", load)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `Generator.generate`."""
        found: list[Completion] = self._call("generate", lambda: self._proxy.generate(prompt_ids, sampling))
        return found

    def progress(self) -> Progress:
        """What it and the lost processes before it have done so far."""
        return together([self._earlier, self._counts.now()])

    def close(self) -> None:
        """End the process at once, for good."""
        with self._lock:
            self._closed = True
            self._end()

    def _make(self, manager: _Manager) -> Any:
        """Let the process make the object that it serves; return a proxy of it."""
        return manager.Generator(self._config)  # type: ignore[attr-defined]

    def _start(self) -> _Manager:
        with self._lock:
            self._end()
            if self._closed:
                raise Lost("the run has ended")
            self._late = None
            self._launched = launch(self.inherited)
            self._earlier = self.progress()
            self._counts.map(self._launched.folder / COUNTS)
            return _Manager(str(self._launched.socket), self._launched.key)

    def _end(self) -> None:
        if self._launched is not None:
            self._launched.end()

    def _call(self, kind: str, work: Callable[[], Any], units: int = 1) -> Any:
        limit = self._deadlines.of(kind, units)
        began = time.monotonic()
        # The connection itself knows no deadline. Its other end closes when the process is killed.
        watchdog = threading.Timer(limit, self._give_up, (self.process, limit))
        watchdog.daemon = True
        watchdog.start()
        try:
            result = work()
        except (EOFError, ConnectionError) as error:
            raise Lost(self._how()) from error
        finally:
            watchdog.cancel()
        self._deadlines.took(kind, time.monotonic() - began)
        return result

    def _give_up(self, process: subprocess.Popen[bytes], limit: float) -> None:
        self._late = limit
        process.kill()

    def _how(self) -> str:
        if self._late is not None:
            return f"it did not answer for {self._late:.0f} s (worker_timeout)"
        assert self.process is not None
        try:
            return f"its process ended with code {self.process.wait(2)} (-9 is often a lack of memory)"
        except subprocess.TimeoutExpired:
            return "its process broke the connection"


class WorkerProcess(GeneratorProcess):
    """As `GeneratorProcess`, with a `Replica`.

    Args:
        config: the settings of its replica.
        share: of a base that it shares with other processes; the process inherits the memory.
        deadlines: as for `GeneratorProcess`.
    """

    def __init__(self, config: Config, share: Share | None = None, *, deadlines: Deadlines | None = None) -> None:
        super().__init__(config, deadlines=deadlines, inherited=() if share is None else (share.memory,))
        self._share = share

    def take(self, members: Sequence[Member], sigma: float, *, played: bool = False) -> None:
        """As `Replica.take`."""
        self._call("take", lambda: self._proxy.take(members, sigma, played=played))

    def complete_each(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """As `Replica.complete_each`."""
        found: list[list[Completion]] = self._call("complete", lambda: self._proxy.complete_each(prompt_ids, sampling))
        return found

    def apply(self, update: Update) -> int:
        """As `Replica.apply`."""
        found: int = self._call("apply", lambda: self._proxy.apply(update))
        return found

    def load(self, checkpoint: Path) -> None:
        """As `Replica.load`."""
        self._call("open", lambda: self._proxy.load(checkpoint))

    def rebuild(self, updates: Sequence[Update], checkpoint: tuple[int, Path] | None = None) -> str:
        """As `Replica.rebuild`."""
        found: str = self._call("rebuild", lambda: self._proxy.rebuild(updates, checkpoint), len(updates))
        return found

    def _make(self, manager: _Manager) -> Any:
        return manager.Replica(self._config, self._share)  # type: ignore[attr-defined]


def main() -> None:
    """Serve a generator or a replica at the socket named on the command line until standard input ends."""
    die_with_thread()  # stopped, it could not notice that its input ends
    key = bytes.fromhex(sys.stdin.readline())
    OWN.map(Path(sys.argv[1]).with_name(COUNTS))
    end_with_parent(with_thread=False)
    _Manager(sys.argv[1], key).get_server().serve_forever()


if __name__ == "__main__":
    main()

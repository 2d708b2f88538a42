"""Generators side by side, this process's and those in processes of their own; one that is lost is replaced."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.progress import Progress, together
from estune.errors import EstuneError
from estune.pool.base import Generating, evaluation_batches
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.generator import open_generator
from estune.pool.process import GeneratorProcess

T = TypeVar("T")
G = TypeVar("G", bound=Generating)
log = logging.getLogger(__name__)

MOST_LOSSES = 3  # processes that one piece of work may cost


class Generators(Generic[G]):
    """Generators that work side by side, each driven by a thread of this process.

    A process that is lost, killed or stopped, is replaced, and does again what it was to do.

    Args:
        replicas: the generators: that of this process, then those of others.
        threads: one for each replica, if processes were opened in them: a process ends with its thread.
    """

    def __init__(self, replicas: Sequence[G], threads: ThreadPoolExecutor | None = None) -> None:
        self.replicas = list(replicas)
        self._closed = False
        self._free: queue.SimpleQueue[G] = queue.SimpleQueue()
        for replica in self.replicas:
            self._free.put(replica)
        self._threads = threads or ThreadPoolExecutor(len(self.replicas), "replica")

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        futures = [
            self._submit(lambda replica, batch=batch: replica.generate(*batch))  # type: ignore[misc]
            for batch in evaluation_batches(prompt_ids, sampling)
        ]
        return [completion for future in futures for completion in future.result()]

    @property
    def engines(self) -> int:
        """How many generators work side by side."""
        return len(self.replicas)

    def progress(self) -> Progress:
        """What all of them have done so far."""
        return together(replica.progress() for replica in self.replicas)

    def close(self) -> None:
        """End generators and threads; batches not yet begun are dropped."""
        self._closed = True
        for replica in self.replicas:
            replica.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _replace(self, replica: G, why: Lost, losses: int) -> None:
        """Start another process in the place of one that is lost.

        Raises:
            EstuneError: too many were lost.
        """
        if self._closed or losses >= MOST_LOSSES or not isinstance(replica, GeneratorProcess):
            raise EstuneError(
                f"{replica} was lost, the last of {losses} for one piece of work: {why}; nothing is lost: resume, or "
                "use fewer --replicas"
            ) from why
        log.warning("%s was lost: %s; another takes its place", replica, why)
        replica.open()

    def _do(self, replica: G, work: Callable[[G], T], replace: Callable[[G, Lost, int], None] | None = None) -> T:
        """Let a replica do something; if it is lost, `replace`, by default `_replace`, starts another that does it."""
        replace = replace or self._replace
        losses = 0
        why: Lost | None = None
        while True:
            try:
                if why is not None:
                    replace(replica, why, losses)
                return work(replica)
            except Lost as error:
                losses += 1
                why = error

    def _submit(self, work: Callable[[G], T]) -> Future[T]:
        def run() -> T:
            replica = self._free.get()
            try:
                return self._do(replica, work)
            finally:
                self._free.put(replica)

        return self._threads.submit(run)


def open_generators(config: Config) -> Generators[Generating]:
    """As many generators as `config.replicas` says: the one of this process, and those in processes of their own.

    Raises:
        EstuneError: for a model or a device that cannot be had.
    """
    deadlines = Deadlines(config.worker_timeout)
    processes = [GeneratorProcess(config, deadlines=deadlines) for _ in range((config.replicas or 1) - 1)]
    own, threads = open_together(lambda: open_generator(config), processes)
    return Generators([own, *processes], threads)


def open_together(open_own: Callable[[], T], processes: Sequence[GeneratorProcess]) -> tuple[T, ThreadPoolExecutor]:
    """Let this process and others load the model at the same time; if anything fails, the others are ended.

    Args:
        open_own: loads the model in this process.
        processes: the others, not yet opened.

    Returns:
        What `open_own` returned, and the threads that have opened the processes, which end with their threads.

    Raises:
        EstuneError: a process was lost meanwhile.
    """
    threads = ThreadPoolExecutor(1 + len(processes), "replica")
    try:
        opened = [threads.submit(process.open) for process in processes]
        own = open_own()
        for process, future in zip(processes, opened, strict=True):
            try:
                future.result()
            except Lost as error:
                raise EstuneError(
                    f"{process} was lost while it loaded the model: {error}; use fewer --replicas"
                ) from error
    except BaseException:
        for process in processes:
            process.close()
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    return own, threads

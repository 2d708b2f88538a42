"""The engines of this machine as one pool: this process's replica, and those in processes of their own.

A member is taken by whoever is free, and its completions depend on its seed alone, so the number of replicas changes
nothing but the time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from estune.completion import Sampling
from estune.config import Config
from estune.pool.base import Evaluator, evaluation_batches
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.process import WorkerProcess
from estune.weights.base import Share, open_memory
from estune.weights.device import training_device
from estune.weights.policies import POLICIES
from estune.weights.rebuild import Steps

if TYPE_CHECKING:
    pass

import logging
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from itertools import repeat
from pathlib import Path
from typing import TypeVar

from estune.completion import Completion
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.journal.journal import StepRecord
from estune.pool.base import Description, Evaluated
from estune.pool.replica import Replica
from estune.weights.trained import Drift

T = TypeVar("T")
log = logging.getLogger(__name__)

MOST_LOSSES = 3  # processes that one piece of work may cost


class LocalPool:
    """Replicas that work side by side, each driven by a thread of this process.

    A process that is lost, killed or stopped, is replaced, and does again what it was to do. Where that was to update
    its share of a base that all have in common, nobody knows how far it came: the base is made anew, from the last
    checkpoint of its own type or the base model, and the updates since.

    Args:
        own: the replica of this process.
        others: those of other processes.
        one_base: they share one base, and each updates its share; otherwise each has its own.
        threads: as many as there are replicas, if processes were opened in them: they end with them.
        memory: file descriptor of the shared base, which processes that come later inherit.
    """

    def __init__(
        self,
        own: Replica,
        others: Sequence[Evaluator] = (),
        *,
        one_base: bool = False,
        threads: ThreadPoolExecutor | None = None,
        memory: int | None = None,
    ) -> None:
        self.own = own
        self.replicas: list[Evaluator] = [own, *others]
        self._one_base = one_base
        self._memory = memory
        self._updates: list[Update] = []  # that the base has had
        self._fingerprint = ""  # after them
        self._checkpoint: tuple[int, Path] | None = None  # a number of them, and the weights after these
        self._closed = False
        self._free: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        for replica in self.replicas:
            self._free.put(replica)
        self._threads = threads or ThreadPoolExecutor(len(self.replicas), "replica")

    def describe(self) -> Description:
        """As `Pool.describe`."""
        return self.own.describe()

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, Evaluated]]:
        """As `Pool.evaluate`."""
        futures: dict[Future[Evaluated], int] = {
            self._submit(lambda r, m=member: r.evaluate(m, sigma, prompt_ids, sampling)): i  # type: ignore[misc]
            for i, member in enumerate(members)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `Pool.generate`."""
        futures = [
            self._submit(lambda replica, batch=batch: replica.generate(*batch))  # type: ignore[misc]
            for batch in evaluation_batches(prompt_ids, sampling)
        ]
        return [completion for future in futures for completion in future.result()]

    def apply(self, update: Update) -> str:
        """Add an update to the base, or to every replica's; return the fingerprint after it.

        Bases of their own are compared: a replica whose machine made an error is found at once. One base for all is
        updated once, by all together, and there is nothing to compare it with: its fingerprint is that of the bits that
        are there, right or wrong, and an error shows when the run is replayed or resumed.

        Raises:
            EstuneError: where bases differ, or processes are lost again and again. A shared base may then be updated in
                part: this pool must not be used any more.
        """
        updates = [*self._updates, update]
        self._fingerprint = self._apply_shared(updates) if self._one_base else self._apply_each(update)
        self._updates = updates
        return self._fingerprint

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """As `Pool.rebuild`."""
        done, self._checkpoint = 0, checkpoint
        if checkpoint is not None:
            done, path = checkpoint
            list(self._threads.map(lambda replica: self._do(replica, lambda r: r.load(path)), self.replicas))
        self._updates = [record.update for record in records[:done]]
        self._fingerprint = self.own.weights.fingerprint()
        updates = [record.update for record in records[done:]]
        sigmas = [record.sigma for record in records[done:]]
        steps = Steps(self.own.weights.rule, updates, sigmas)
        steps.retrace(self.own.weights.perturb, lambda number: self.apply(updates[number]))
        return self.own.weights.fingerprint()

    def save(self, path: Path, dtype: str) -> None:
        """As `Pool.save`."""
        self.own.save(path, dtype)
        if dtype == self.own.weights.rule.dtype:  # not rounded: who has to begin anew can begin here
            self._checkpoint = len(self._updates), path

    def drift(self) -> Drift | None:
        """As `Pool.drift`."""
        return self.own.drift()

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """As `Pool.compare`."""
        return self.own.compare(prompt_ids, completion_ids)

    def close(self) -> None:
        """End replicas and threads; members not yet begun are dropped."""
        self._closed = True
        for replica in self.replicas:
            replica.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def _apply_each(self, update: Update) -> str:
        """Add an update to the base of every replica."""
        sums = self._threads.map(lambda replica: self._do(replica, lambda r: r.apply(update)), self.replicas)
        fingerprints = {as_fingerprint(total) for total in sums}
        if len(fingerprints) > 1:
            raise EstuneError(
                f"step {update.step}: after the same update replicas' weights differ ({', '.join(fingerprints)}): "
                "no sound machine does that; nothing wrong was recorded: resume, on another machine if it happens again"
            )
        (fingerprint,) = fingerprints
        return fingerprint

    def _apply_shared(self, updates: Sequence[Update]) -> str:
        """Add the last of all the run's updates to the base that all share, each to its share."""
        done, before, losses, found = len(updates) - 1, self._fingerprint, 0, ""
        while done < len(updates):
            update = updates[done]
            outcomes = list(self._threads.map(_try_apply, self.replicas, repeat(update)))
            lost = [(r, o) for r, o in zip(self.replicas, outcomes, strict=True) if isinstance(o, Lost)]
            if not lost:
                done, found = done + 1, as_fingerprint(sum(total for total in outcomes if not isinstance(total, Lost)))
                if losses and done == len(updates) - 1 and found != before:
                    raise EstuneError(
                        f"step {update.step}: made anew, weights have fingerprint {found}, and had {before} before: no "
                        "sound machine does that; nothing wrong was recorded: resume"
                    )
                continue
            losses += 1
            for replica, error in lost:
                self._replace(replica, error, losses)
            done = self._begin_anew()
            log.warning("the base may have been updated in part: it is made anew, by %d updates", len(updates) - done)
        return found

    def _begin_anew(self) -> int:
        """Fill the shared base from a checkpoint, or from the base model; return the number of updates in it."""
        done, path = self._checkpoint or (0, self.own.checkpoint.path)
        if not path.is_dir():  # somebody removed it
            done, path = 0, self.own.checkpoint.path
        self.own.load(path)
        return done

    def _replace(self, replica: Evaluator, why: Lost, losses: int) -> None:
        """Start another process in the place of one that is lost, with the weights that it had before.

        Raises:
            EstuneError: this was the last of too many.
        """
        if self._closed or losses >= MOST_LOSSES or not isinstance(replica, WorkerProcess):
            raise EstuneError(
                f"{replica} was lost, the last of {losses} for one piece of work: {why}; nothing is lost: resume, or "
                "use fewer --replicas"
            ) from why
        log.warning("%s was lost: %s; another takes its place", replica, why)
        replica.open()
        if self._updates and not self._one_base:
            found = replica.rebuild(self._updates, self._checkpoint)
            if found != self._fingerprint:
                found = replica.rebuild(self._updates)
            if found != self._fingerprint:
                raise EstuneError(
                    f"{replica}: the updates so far give fingerprint {found} there, {self._fingerprint} elsewhere: no "
                    "sound machine does that; nothing wrong was recorded: resume"
                )

    def _do(self, replica: Evaluator, work: Callable[[Evaluator], T]) -> T:
        """Let a replica do something, and what takes its place if it is lost."""
        losses, why = 0, None
        while True:
            try:
                if why is not None:
                    self._replace(replica, why, losses)
                return work(replica)
            except Lost as error:
                losses, why = losses + 1, error

    def _submit(self, work: Callable[[Evaluator], T]) -> Future[T]:
        def run() -> T:
            replica = self._free.get()
            try:
                return self._do(replica, work)
            finally:
                self._free.put(replica)

        return self._threads.submit(run)


def _try_apply(replica: Evaluator, update: Update) -> int | Lost:
    try:
        return replica.apply(update)
    except Lost as error:
        return error


def open_local_pool(config: Config, *, perturbs: bool = True) -> LocalPool:
    """The replica of this process, and those in processes of their own.

    On a CPU they share one base, which the replica of this process fills. Those that do not perturb have none.

    Raises:
        EstuneError: for a model that cannot be had or, if they perturb, trained.
    """
    count = config.replicas or 1
    has_base = perturbs and POLICIES[config.weights].keeps_base
    one_base = has_base and count > 1 and training_device(config.device).type == "cpu"
    memory = open_memory() if one_base else None
    shares = [None if memory is None else Share(memory, i, count) for i in range(count)]
    deadlines = Deadlines(config.worker_timeout)
    workers = [WorkerProcess(config, share, perturbs=perturbs, deadlines=deadlines) for share in shares[1:]]
    threads = ThreadPoolExecutor(count, "replica")
    try:
        opened = [threads.submit(worker.open) for worker in workers]
        own = Replica(config, shares[0], perturbs=perturbs)
        for worker, future in zip(workers, opened, strict=True):
            try:
                future.result()
            except Lost as error:
                raise EstuneError(
                    f"{worker} was lost while it loaded the model: {error}; use fewer --replicas"
                ) from error
    except BaseException:
        for worker in workers:
            worker.close()
        threads.shutdown(wait=False, cancel_futures=True)
        if memory is not None:
            os.close(memory)
        raise
    return LocalPool(own, workers, one_base=one_base, threads=threads, memory=memory)

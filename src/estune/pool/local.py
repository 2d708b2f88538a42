"""The engines of this machine as one pool: this process's replica, and those in processes of their own.

A member is taken by whoever is free, and its completions depend on its seed alone, so the number of replicas changes
nothing but the time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from estune.completion import Sampling
from estune.config import Config
from estune.pool.base import EVALUATION_BATCH, Evaluator
from estune.pool.process import WorkerProcess
from estune.weights.base import Share, open_memory
from estune.weights.device import training_device
from estune.weights.policies import POLICIES
from estune.weights.rebuild import Steps

if TYPE_CHECKING:
    pass

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import replace
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


class LocalPool:
    """Replicas that work side by side, each driven by a thread of this process.

    Args:
        own: the replica of this process.
        others: further ones. Each has a base of its own, or all have one base and a share of it each.
        one_base: which of the two.
    """

    def __init__(self, own: Replica, others: Sequence[Evaluator] = (), *, one_base: bool = False) -> None:
        self.own = own
        self.replicas: list[Evaluator] = [own, *others]
        self._one_base = one_base
        self._free: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        for replica in self.replicas:
            self._free.put(replica)
        self._threads = ThreadPoolExecutor(len(self.replicas), "replica")

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
            # A batch numbers its rows from 0: a seed of its own keeps sampled rows of two batches apart.
            self._submit(
                lambda r, i=i: r.generate(  # type: ignore[misc]
                    prompt_ids[i : i + EVALUATION_BATCH], replace(sampling, seed=sampling.seed + i)
                )
            )
            for i in range(0, len(prompt_ids), EVALUATION_BATCH)
        ]
        return [completion for future in futures for completion in future.result()]

    def apply(self, update: Update) -> str:
        """Add an update to the base, or to every replica's; return the fingerprint after it.

        Bases of their own are compared: a replica whose machine made an error is found at once. One base for all is
        updated once, by all together, and there is nothing to compare it with: its fingerprint is that of the bits that
        are there, right or wrong, and an error shows when the run is replayed or resumed.

        Raises:
            EstuneError: where a replica is gone or bases differ. A shared base may then be updated in part: this pool
                must not be used any more.
        """
        sums = list(self._threads.map(lambda replica: replica.apply(update), self.replicas))
        if self._one_base:
            return as_fingerprint(sum(sums))
        fingerprints = {as_fingerprint(total) for total in sums}
        if len(fingerprints) > 1:
            raise EstuneError(
                f"step {update.step}: after the same update replicas' weights differ ({', '.join(fingerprints)}): "
                "no sound machine does that; nothing wrong was recorded: resume, on another machine if it happens again"
            )
        (fingerprint,) = fingerprints
        return fingerprint

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """As `Pool.rebuild`."""
        done = 0
        if checkpoint is not None:
            done, path = checkpoint
            list(self._threads.map(lambda replica: replica.load(path), self.replicas))
        updates = [record.update for record in records[done:]]
        sigmas = [record.sigma for record in records[done:]]
        steps = Steps(self.own.weights.rule, updates, sigmas)
        steps.retrace(self.own.weights.perturb, lambda number: self.apply(updates[number]))
        return self.own.weights.fingerprint()

    def save(self, path: Path, dtype: str) -> None:
        """As `Pool.save`."""
        self.own.save(path, dtype)

    def drift(self) -> Drift | None:
        """As `Pool.drift`."""
        return self.own.drift()

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """As `Pool.compare`."""
        return self.own.compare(prompt_ids, completion_ids)

    def close(self) -> None:
        """End replicas and threads; members not yet begun are dropped."""
        for replica in self.replicas:
            replica.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit(self, work: Callable[[Evaluator], T]) -> Future[T]:
        def run() -> T:
            replica = self._free.get()
            try:
                return work(replica)
            finally:
                self._free.put(replica)

        return self._threads.submit(run)


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
    workers: list[WorkerProcess] = []
    try:
        workers.extend(WorkerProcess(share) for share in shares[1:])
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            opened = [threads.submit(worker.open, config, perturbs) for worker in workers]
            own = Replica(config, shares[0], perturbs=perturbs)
            for future in opened:
                future.result()
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    finally:
        if memory is not None:
            os.close(memory)  # all have mapped it, or never will
    return LocalPool(own, workers, one_base=one_base)

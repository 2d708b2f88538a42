"""Who evaluates which member: replicas on this machine.

A member is taken by whoever is free, and its completions depend on its seed alone, so the number of replicas changes
nothing but the time.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from estune.engines.base import Completion, Sampling
from estune.errors import EstuneError
from estune.replica import Evaluated
from estune.strategy import Member, Update
from estune.weights import as_fingerprint

T = TypeVar("T")

# Prompts of an evaluation given to one replica at a time. Fixed, so that batches do not depend on their number.
EVALUATION_BATCH = 128


class Evaluator(Protocol):
    """What a pool needs of a replica: `Replica`, or `WorkerProcess`, which passes calls on to one."""

    def evaluate(
        self, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """Generate with a member's weights."""
        ...

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        ...

    def apply(self, update: Update) -> int:
        """Add an update to the base, or to its share of it; return the sum of the hashes of that after it."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base, if this replica is the one that fills it."""
        ...

    def close(self) -> None:
        """Release what it holds; a process ends at once."""
        ...


class LocalPool:
    """Replicas that work side by side, each driven by a thread of this process.

    Args:
        replicas: each with a base of its own, or all with one base and a share of it each.
        one_base: which of the two.
    """

    def __init__(self, replicas: Sequence[Evaluator], *, one_base: bool = False) -> None:
        self.replicas = list(replicas)
        self._one_base = one_base
        self._free: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        for replica in self.replicas:
            self._free.put(replica)
        self._threads = ThreadPoolExecutor(len(self.replicas), "replica")

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, Evaluated]]:
        """Generate with each member's weights; yields (index, result) as they finish, while others go on."""
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
        """Generate with the base weights."""
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

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base, or every replica's."""
        list(self._threads.map(lambda replica: replica.load(checkpoint), self.replicas))

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

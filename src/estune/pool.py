"""Who evaluates which member.

- `LocalPool`: replicas on this machine, in this process and others.
- `RayPool` (`ray_pool.py`): workers on any number of GPUs and machines.

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
from estune.journal import StepRecord
from estune.replica import Description, Evaluated, Replica
from estune.strategy import Member, Update
from estune.weights import Drift, as_fingerprint

T = TypeVar("T")

# Prompts of an evaluation given to one replica at a time. Fixed, so that batches do not depend on their number.
EVALUATION_BATCH = 128


class Pool(Protocol):
    """What a run needs of those who evaluate its members. All of them hold the same base weights."""

    def describe(self) -> Description:
        """What they train, and the fingerprint of their weights."""
        ...

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, Evaluated]]:
        """Generate with each member's weights; yields (index, result) as they finish, while others go on."""
        ...

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        ...

    def apply(self, update: Update) -> str:
        """Add an update to the base weights; return the fingerprint after it.

        Raises:
            EstuneError: where it cannot be done by all. The pool must then not be used any more.
        """
        ...

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """Bring fresh base weights to where these steps lead; return the fingerprint there.

        Args:
            records: all steps of the run so far.
            checkpoint: a number of steps and the weights after them, to begin with.
        """
        ...

    def save(self, path: Path, dtype: str) -> None:
        """Write the base weights as a checkpoint of this type."""
        ...

    def drift(self) -> Drift | None:
        """What restoring left behind since the last update; None where it leaves nothing."""
        ...

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """How far the base weights have come from the base model; see `Replica.compare`."""
        ...

    def close(self) -> None:
        """End all that was started."""
        ...


class Evaluator(Protocol):
    """What a local pool needs of a replica: `Replica`, or `WorkerProcess`, which passes calls on to one."""

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
        for record in records[done:]:
            if self.own.policy == "inplace":  # what rounding left behind at each restore is part of the run
                for member in record.update.members:
                    self.own.weights.perturb(member, record.sigma)
            self.apply(record.update)
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

"""The engines of this machine as one pool: this process's replica, and those in processes of their own.

A member is taken by any replica that is free, and its completions depend on its seed alone, so that the number of
replicas changes nothing but the time.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial
from itertools import repeat
from pathlib import Path

from estune.completion import Sampling
from estune.config import Config
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.grading.rollout import is_played
from estune.journal.records import StepRecord
from estune.pool.base import Description, Evaluated, Evaluator
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.gate import Gate
from estune.pool.generators import Generators, open_together
from estune.pool.launch import memory_ahead
from estune.pool.process import WorkerProcess
from estune.pool.replica import Replica
from estune.weights.base import Share, open_memory
from estune.weights.device import training_device
from estune.weights.policies import POLICIES
from estune.weights.rebuild import Steps
from estune.weights.trained import Drift

log = logging.getLogger(__name__)


class LocalPool(Generators[Evaluator]):
    """Replicas that work side by side.

    A replica that takes the place of a lost one makes the updates so far again. If the lost one was updating its share
    of a common base, nobody knows how far it came: the base is made anew, from the last checkpoint of its own type or
    the base model, and the updates since.

    Args:
        own: the replica of this process.
        others: those of other processes.
        one_base: they share one base, and each updates its share; otherwise each has its own.
        threads: as for `Generators`.
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
        super().__init__([own, *others], threads)
        self.own = own
        self._one_base = one_base
        self._memory = memory
        self._updates: list[Update] = []  # that the base has had
        self._fingerprint = ""  # after them
        self._checkpoint: tuple[int, Path] | None = None  # a number of them, and the weights after these
        self._gate = Gate()  # to the base
        # The others can be at work on members that were given ahead.
        self._updaters = ThreadPoolExecutor(len(self.replicas), "update")

    def describe(self) -> Description:
        """As `Pool.describe`."""
        return self.own.describe()

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> LocalEvaluation:
        """As `Pool.evaluate`."""

        played = is_played(prompt_ids)

        def evaluate(some: Sequence[Member], replica: Evaluator) -> list[Evaluated]:
            began = time.perf_counter()
            with self._gate.reading():
                updates = len(self._updates)
                replica.take(some, sigma, played=played)
            taken = time.perf_counter()
            completions = replica.complete_each(prompt_ids, sampling)
            times = (taken - began) / len(some), (time.perf_counter() - taken) / len(some)
            return [Evaluated(each, *times, updates) for each in completions]

        count = self.own.at_once(prompt_ids, sampling, math.ceil(len(members) / self.engines))
        groups = {first: members[first : first + count] for first in range(0, len(members), count)}
        return LocalEvaluation({self._submit(partial(evaluate, some)): first for first, some in groups.items()})

    def apply(self, update: Update) -> str:
        """Add an update to the base, or to every replica's; return the fingerprint after it.

        If each replica has a base of its own, these are compared, and a replica with an error is found at once. A
        common base is updated by all together, and there is nothing to compare it with: its fingerprint is that of the
        bits that are there, right or wrong, and an error shows when the run is replayed or resumed.

        Raises:
            EstuneError: bases differ, or processes are lost again and again. A shared base may then be updated in part,
                and this pool must not be used any more.
        """
        updates = [*self._updates, update]
        with self._gate.writing():
            self._fingerprint = self._apply_shared(updates) if self._one_base else self._apply_each(update)
            self._updates = updates
        return self._fingerprint

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """As `Pool.rebuild`."""
        done = 0
        self._checkpoint = checkpoint
        if checkpoint is not None:
            done, path = checkpoint
            list(self._updaters.map(lambda replica: self._do(replica, lambda r: r.load(path)), self.replicas))
        self._updates = [record.update for record in records[:done]]
        self._fingerprint = self.own.weights.fingerprint()
        updates = [record.update for record in records[done:]]
        steps = Steps(self.own.weights.rule, updates)
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
        super().close()
        self._updaters.shutdown(wait=False, cancel_futures=True)
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    def _apply_each(self, update: Update) -> str:
        """Add an update to the base of every replica."""

        def apply(replica: Evaluator) -> int:
            return self._do(replica, lambda r: r.apply(update), replace=self._put_another)

        fingerprints = {as_fingerprint(total) for total in self._updaters.map(apply, self.replicas)}
        if len(fingerprints) > 1:
            raise EstuneError(
                f"step {update.step + 1}: after the same update replicas' weights differ ({', '.join(fingerprints)}): "
                "no sound machine does that; nothing wrong was recorded: resume, on another machine if it happens again"
            )
        (fingerprint,) = fingerprints
        return fingerprint

    def _apply_shared(self, updates: Sequence[Update]) -> str:
        """Add the last of all the run's updates to the common base, each replica to its share."""
        done = len(updates) - 1
        before = self._fingerprint
        losses = 0
        found = ""
        while done < len(updates):
            update = updates[done]
            outcomes = list(self._updaters.map(_try_apply, self.replicas, repeat(update)))
            lost = [(r, o) for r, o in zip(self.replicas, outcomes, strict=True) if isinstance(o, Lost)]
            if not lost:
                done = done + 1
                found = as_fingerprint(sum(total for total in outcomes if not isinstance(total, Lost)))
                if losses and done == len(updates) - 1 and found != before:
                    raise EstuneError(
                        f"step {update.step + 1}: made anew, weights have fingerprint {found}, not {before} as before: "
                        "no sound machine does that; nothing wrong was recorded: resume"
                    )
                continue
            losses += 1
            for replica, error in lost:
                self._put_another(replica, error, losses)
            done = self._begin_anew()
            log.warning("the base may have been updated in part: it is made anew, by %d updates", len(updates) - done)
        return found

    def _begin_anew(self) -> int:
        """Fill the shared base from a checkpoint, or from the base model; return the number of updates in it."""
        done, path = self._checkpoint or (0, self.own.checkpoint.path)
        if not path.is_dir():  # somebody removed it
            done = 0
            path = self.own.checkpoint.path
        self.own.load(path)
        return done

    def _replace(self, replica: Evaluator, why: Lost, losses: int) -> None:
        """As `Generators._replace`, with the weights that the lost replica had; not while these change.

        Raises:
            EstuneError: too many were lost, or the weights do not become what they were.
        """
        with self._gate.reading():
            self._put_another(replica, why, losses)

    def _put_another(self, replica: Evaluator, why: Lost, losses: int) -> None:
        super()._replace(replica, why, losses)
        if self._updates and not self._one_base:
            found = replica.rebuild(self._updates, self._checkpoint)
            if found != self._fingerprint:
                found = replica.rebuild(self._updates)
            if found != self._fingerprint:
                raise EstuneError(
                    f"{replica}: the updates so far give fingerprint {found} there, {self._fingerprint} elsewhere: no "
                    "sound machine does that; nothing wrong was recorded: resume"
                )


class LocalEvaluation:
    """As `Evaluation`.

    Args:
        futures: what becomes of some members, one after another, with the index of the first.
    """

    def __init__(self, futures: Mapping[Future[list[Evaluated]], int]) -> None:
        self._futures = futures
        self._completed = as_completed(futures)
        self._ready: deque[tuple[int, Evaluated]] = deque()

    def __iter__(self) -> LocalEvaluation:
        return self

    def __next__(self) -> tuple[int, Evaluated]:
        if not self._ready:
            future = next(self._completed)
            self._ready.extend(enumerate(future.result(), self._futures[future]))
        return self._ready.popleft()

    def close(self) -> None:
        """As `Evaluation.close`."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)


def _try_apply(replica: Evaluator, update: Update) -> int | Lost:
    try:
        return replica.apply(update)
    except Lost as error:
        return error


def open_local_pool(config: Config) -> LocalPool:
    """A pool of this process's replica and those in processes of their own.

    On a CPU they share one base, which the replica of this process fills, if the policy keeps a base. With moments each
    has its own: what a lost one held beside its share of a base, nobody could make again without all others.

    Raises:
        EstuneError: for a model that cannot be had or trained.
    """
    count = config.replicas or 1
    on_cpu = training_device(config.device).type == "cpu"
    if config.max_staleness and count > 1 and not on_cpu:
        raise EstuneError(
            f"max_staleness: replicas on {config.device} cannot be updated while they generate: give workers={count} "
            "in their place, or set max_staleness=0"
        )
    keeps_base = POLICIES[config.weights].keeps_base
    one_base = keeps_base and count > 1 and on_cpu and not config.adam
    memory = (memory_ahead() or open_memory()) if one_base else None
    shares = [None if memory is None else Share(memory, i, count) for i in range(count)]
    deadlines = Deadlines(config.worker_timeout)
    workers = [WorkerProcess(config, share, deadlines=deadlines) for share in shares[1:]]
    try:
        own, threads = open_together(lambda: Replica(config, shares[0]), workers)
    except BaseException:
        if memory is not None:
            os.close(memory)
        raise
    return LocalPool(own, workers, one_base=one_base, threads=threads, memory=memory)

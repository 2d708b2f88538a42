"""A crew of workers as a pool: members go to whoever is free, updates to all, and fingerprints are compared."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.progress import Counts, Progress
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.journal.records import StepRecord
from estune.pool.base import Description, Evaluated, evaluation_batches
from estune.pool.crew import Crew, Jobs, Weights
from estune.pool.slots import Slot, Source
from estune.weights.adapted import open_checkpoint
from estune.weights.rebuild import Steps
from estune.weights.trained import Drift

K = TypeVar("K")
log = logging.getLogger(__name__)

SETTLE = 10.0  # seconds that the first worker waits for the others to come


class CrewPool:
    """A crew's workers as a `Pool`.

    Args:
        config: the run's settings.
        count: how many workers.
        source: where they come from.
    """

    def __init__(self, config: Config, count: int, source: Source) -> None:
        self.crew = Crew(config, count, source)
        self._config = config
        self._source = source
        self._counts = Counts()  # of what has come back: workers tell of nothing on the way

    def wait_for_workers(self, most: float = SETTLE) -> None:
        """Wait until a worker is ready, and then at most `most` seconds for the others."""
        began = time.monotonic()

        def enough() -> bool | None:
            late = any(slot.state in {"waiting", "loading"} for slot in self.crew.slots)
            return (bool(self.crew.ready()) and (not late or time.monotonic() - began > most)) or None

        self.crew.wait(enough)

    def opened(self) -> Self:
        """This pool once a worker is ready; where none comes, all are ended.

        Raises:
            EstuneError: none can be had.
        """
        try:
            self.wait_for_workers()
        except BaseException:
            self.close()
            raise
        return self

    def describe(self) -> Description:
        """As `Pool.describe`: what all workers agree on; those that do not are refused."""
        _, description = self.crew.wait(lambda: self.crew.reference)
        return replace(description, fingerprint=self.crew.weights.fingerprint)

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> CrewEvaluation:
        """As `Pool.evaluate`."""
        self._source.check(at_once=True)
        prompts = self._sent(prompt_ids)

        def count(done: Evaluated) -> None:
            self._count(prompt_ids, done.completions, sampling, done.generate_time)

        size = min(self.members_at_once(), math.ceil(len(members) / self.engines))
        if size == 1:
            return CrewEvaluation(self.crew.run("evaluate", [(m, sigma, prompts, sampling) for m in members]), count)
        groups = [members[first : first + size] for first in range(0, len(members), size)]
        jobs = self.crew.run("evaluate_each", [(some, sigma, prompts, sampling) for some in groups])
        return CrewEvaluation(jobs, count, size)

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `Pool.generate`."""
        batches = evaluation_batches(prompt_ids, sampling)
        found: dict[int, list[Completion]] = {}
        for job in self.crew.run("generate", batches):
            found[job.index] = job.result
            self._count(batches[job.index][0], job.result, sampling)
        return [completion for index in range(len(batches)) for completion in found[index]]

    def apply(self, update: Update) -> str:
        """As `Pool.apply`. Weights that differ from the majority's are made anew; without a majority, all are.

        While members are at work that were given ahead, the first worker that is free makes the update and tells the
        fingerprint. Each of the others makes it when it is free, and is refused if its fingerprint differs.
        """
        history = [*self.crew.weights.history, update]
        if not self.crew.at_work:
            return self._bring_all(history, "apply", (self._done, update))
        (job,) = self.crew.run("apply", [(update,)], at_once=True)
        assert job.handle is not None
        self.crew.commit(Weights(history, job.result), [job.handle])
        return str(job.result)

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """As `Pool.rebuild`."""
        updates = [record.update for record in records]
        start = checkpoint and (checkpoint[0], checkpoint[1].absolute())
        self.crew.checkpoint = start
        return self._bring_all(updates, "rebuild", (updates, start))

    def save(self, path: Path, dtype: str) -> None:
        """As `Pool.save`: by a worker on this machine or, without one, by replay over this machine's base."""
        path = path.absolute()
        weights = self.crew.weights
        near = [slot for slot in self.crew.ready() if self._is_near(slot)]
        if not any(self.crew.ask([slot], "save", (self._done, weights.fingerprint, path, dtype)) for slot in near):
            self._replay(path, dtype)
        if dtype == self.describe().dtype:  # not rounded: workers that come later can begin with it
            self.crew.checkpoint = self._done, path

    def drift(self) -> Drift | None:
        """None: workers restore exactly."""
        return None

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """As `Pool.compare`."""
        (job,) = self.crew.run("compare", [(prompt_ids, completion_ids)])
        found: dict[str, float] = job.result
        return found

    @property
    def engines(self) -> int:
        """As `Pool.engines`."""
        return len(self.crew.slots)

    def progress(self) -> Progress:
        """As `Pool.progress`."""
        return self._counts.now()

    def _count(
        self, prompt_ids: Sequence[Sequence[int]], completions: list[Completion], sampling: Sampling, seconds: float = 0
    ) -> None:
        """Count completions that have come back. How long those of an evaluation took is not known."""
        self._counts.add(
            Progress(
                read=sum(map(len, prompt_ids)),
                settled=len(completions) * sampling.max_new_tokens,
                tokens=sum(len(c.token_ids) for c in completions),
                writing=int(seconds * 1e9),
            )
        )

    def close(self) -> None:
        """End all workers."""
        self.crew.close()

    def _sent(self, prompt_ids: Sequence[Sequence[int]]) -> Any:
        """The prompts of a step as workers are given them."""
        return prompt_ids

    def members_at_once(self) -> int:
        """How many members a worker is given at once."""
        return 1

    def _is_near(self, slot: Slot) -> bool:
        """Whether a worker can write to this machine's files."""
        return False

    @property
    def _done(self) -> int:
        return len(self.crew.weights.history)

    def _bring_all(self, history: list[Update], kind: str, arguments: tuple[Any, ...]) -> str:
        """Bring all workers to the end of `history`; return the fingerprint that they find there.

        Raises:
            EstuneError: fingerprints differ even after weights were made anew.
        """
        votes: dict[Slot, str] = {}
        while not votes:
            self.crew.wait(lambda: self.crew.ready() or None)
            handles = {slot: slot.handle for slot in self.crew.slots}
            votes = self.crew.ask(self.crew.slots, kind, arguments)
            odd = minority(votes)
            if odd:
                names = ", ".join(map(str, odd))
                log.warning("after %d steps the weights of %s differ, and are made anew", len(history), names)
                votes = {slot: vote for slot, vote in votes.items() if slot not in odd}
                votes |= self.crew.ask(odd, "rebuild", (history, None))
        if len(set(votes.values())) > 1:
            raise EstuneError(
                f"step {len(history)}: after the same updates workers' weights differ "
                f"({', '.join(f'{slot}: {vote}' for slot, vote in votes.items())}): no sound machine does that; "
                "nothing wrong was recorded: resume without the machine that is alone with its result"
            )
        weights = Weights(history, next(iter(votes.values())))
        self.crew.commit(weights, [h for slot in votes if (h := handles[slot]) is not None and h is slot.handle])
        return weights.fingerprint

    def _replay(self, path: Path, dtype: str) -> None:
        """Write the weights without any worker."""
        config = self._config
        trained = self.describe()
        weights = self.crew.weights
        base = open_checkpoint(config.model, config.adapter)
        if base.content_hash() != trained.base_hash:
            raise EstuneError(
                f"{path}: no worker is on this machine to write it, and the base model {config.model} is another one "
                "here than where the workers are: put theirs here, and resume"
            )

        def verify(found: str) -> None:
            if found != weights.fingerprint:
                raise EstuneError(f"{path}: replay on this machine gives other weights than the workers have; resume")

        Steps(trained.rule, weights.history).write(base, trained.tensors, path, dtype, verify)


class CrewEvaluation:
    """As `Evaluation`.

    Args:
        jobs: each evaluates a member, or some, one after another.
        count: called with each result.
        size: how many members those that evaluate some have, but for the last; None where each has one.
    """

    def __init__(self, jobs: Jobs, count: Callable[[Evaluated], None], size: int | None = None) -> None:
        self._jobs = jobs
        self._count = count
        self._size = size
        self._ready: deque[tuple[int, Evaluated]] = deque()

    def __iter__(self) -> CrewEvaluation:
        return self

    def __next__(self) -> tuple[int, Evaluated]:
        if not self._ready:
            job = next(self._jobs)
            first, found = (job.index, [job.result]) if self._size is None else (job.index * self._size, job.result)
            self._ready.extend(enumerate(found, first))
        index, evaluated = self._ready.popleft()
        self._count(evaluated)
        return index, evaluated

    def close(self) -> None:
        """As `Evaluation.close`."""
        self._jobs.close()


def minority(votes: Mapping[K, str]) -> list[K]:
    """The keys whose vote is not the most frequent one; all keys on a tie."""
    counts = Counter(votes.values()).most_common()
    if len(counts) < 2:
        return []
    tie = counts[0][1] == counts[1][1]
    return [key for key, vote in votes.items() if tie or vote != counts[0][0]]

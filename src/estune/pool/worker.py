"""A replica as somebody else's worker. Light to import, as its process does before it has a model to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from estune.journal.records import FORMAT
from estune.noise.reference import NOISE_VERSION
from estune.versions import packages

if TYPE_CHECKING:
    from estune.completion import Completion, Sampling
    from estune.config import Config
    from estune.es.strategy import Member, Update
    from estune.pool.base import Description, Evaluated
    from estune.pool.replica import Trained


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs, and the versions there of what matters to the numbers."""

    node: str  # Ray's id of it, or the address of a server
    host: str
    pid: int
    software: dict[str, str]


class StaleWeights(Exception):
    """The worker's weights are not those that the call is about."""


def software() -> dict[str, str]:
    """Versions, by name, that must be the same for all workers of a run."""
    return {**packages(), "noise": str(NOISE_VERSION), "journal": str(FORMAT)}


class Worker:
    """Passes calls on to a `Replica`, once it is sure that its weights are those of the caller.

    `done`, the first argument of most calls, is the number of updates that the weights must have had. They raise
    `StaleWeights` where it is another.
    """

    replica: Trained

    def __init__(self) -> None:
        self.done = -1  # no weights, or nobody knows which
        self._last: Update | None = None
        self._fingerprint = ""

    def open(self, config: Config) -> Description:
        """Load the model.

        Raises:
            EstuneError: for a model that cannot be had on this machine, or trained.
        """
        from estune.pool.replica import Replica

        self.replica = Replica(config)
        description = self.replica.describe()
        self.done = 0
        self._fingerprint = description.fingerprint
        return description

    def evaluate(
        self, done: int, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """As `Replica.evaluate`."""
        self._require(done)
        return replace(self.replica.evaluate(member, sigma, prompt_ids, sampling), updates=done)

    def evaluate_each(
        self,
        done: int,
        members: Sequence[Member],
        sigma: float,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[Evaluated]:
        """As `Replica.evaluate_each`, for any number of members."""
        self._require(done)
        count = self.replica.at_once(prompt_ids, sampling)
        groups = [members[first : first + count] for first in range(0, len(members), count)]
        found = [each for some in groups for each in self.replica.evaluate_each(some, sigma, prompt_ids, sampling)]
        return [replace(each, updates=done) for each in found]

    def generate(self, done: int, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `Replica.generate`."""
        self._require(done)
        return self.replica.generate(prompt_ids, sampling)

    def hold(self, done: int, member: Member | None, sigma: float) -> None:
        """Make the live weights a member's or, without one, the base, for as long as rollouts are played with them."""
        self._require(done)
        if member is None:
            self.replica.weights.restore()
        else:
            self.replica.take([member], sigma, played=True)

    def compare(
        self, done: int, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """As `Replica.compare`."""
        self._require(done)
        return self.replica.compare(prompt_ids, completion_ids)

    def apply(self, done: int, update: Update) -> str:
        """Add the update after the first `done`; return the fingerprint. If it was added already, only return that."""
        from estune.es.update import as_fingerprint

        if self.done == done + 1 and self._last == update:
            return self._fingerprint
        self._require(done)
        self.done = -1  # until the update is whole
        self._fingerprint = as_fingerprint(self.replica.apply(update))
        self.done = done + 1
        self._last = update
        return self._fingerprint

    def rebuild(self, updates: Sequence[Update], checkpoint: tuple[int, Path] | None) -> str:
        """As `Replica.rebuild`, whatever the weights were."""
        self.done = -1
        self._fingerprint = self.replica.rebuild(updates, checkpoint)
        self.done = len(updates)
        self._last = updates[-1] if updates else None
        return self._fingerprint

    def save(self, done: int, fingerprint: str, path: Path, dtype: str) -> None:
        """As `Replica.save`, once it is sure that the weights have this fingerprint."""
        self._require(done)
        if self.replica.weights.fingerprint() != fingerprint:
            self.done = -1
            raise StaleWeights
        self.replica.save(path, dtype)

    def _require(self, done: int) -> None:
        if self.done != done:
            raise StaleWeights

"""What evaluates members: to the trainer a pool, made of evaluators; and what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from estune.completion import Completion, Sampling
from estune.config.sections import EngineName
from estune.engines.progress import Progress
from estune.es.strategy import Member, Update
from estune.journal.records import StepRecord
from estune.weights.policies import Rule
from estune.weights.trained import Drift


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A member's completions, one per prompt, the seconds they took, and the updates that the base had had by then."""

    completions: list[Completion]
    perturb_time: float
    generate_time: float
    updates: int = 0


class Evaluation(Iterator[tuple[int, Evaluated]], Protocol):
    """Members that are evaluated: the index and the result of each, as they finish, while others go on."""

    def close(self) -> None:
        """Drop members that are not begun, and wait for those that are."""
        ...


@dataclass(frozen=True, slots=True)
class Description:
    """What a replica trains. Two replicas of one run have equal descriptions."""

    engine: EngineName  # what generates
    base_hash: str  # content hash of the base checkpoint
    files: dict[str, str]  # and hashes of the files beside its tensors, by name
    rule: Rule  # how the base weights are kept and changed
    live_dtype: str  # of the weights that generate
    tensors: dict[str, list[str]]  # trained tensors of the checkpoint, each with the names tied to it
    elements: int  # of all trained tensors
    fingerprint: str  # of the base weights, now
    device: str  # its kind: another one can round otherwise

    @property
    def dtype(self) -> str:
        """Type of the base weights."""
        return self.rule.dtype


# Prompts of an evaluation given to one replica at a time. Fixed, so that batches do not depend on their number.
EVALUATION_BATCH = 128


def evaluation_batches(
    prompt_ids: Sequence[Sequence[int]], sampling: Sampling
) -> list[tuple[Sequence[Sequence[int]], Sampling]]:
    """The prompts of an evaluation in batches, each with a seed of its own.

    An engine numbers the rows of a batch from 0: sampled rows of two batches would be alike with the same seed.
    """
    return [
        (prompt_ids[i : i + EVALUATION_BATCH], replace(sampling, seed=sampling.seed + i))
        for i in range(0, len(prompt_ids), EVALUATION_BATCH)
    ]


class Pool(Protocol):
    """What a run needs of the engines that evaluate its members. All of them hold the same base weights."""

    @property
    def engines(self) -> int:
        """How many engines work side by side."""
        ...

    def progress(self) -> Progress:
        """What all engines have done so far. May be called from any thread, while they are at work."""
        ...

    def describe(self) -> Description:
        """What the engines train, and the fingerprint of their weights."""
        ...

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluation:
        """Begin to generate with each member's weights. Engines that are free take members in the order given.

        `apply` may be called while members are at work: each is perturbed around the base as it is when it begins.
        """
        ...

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        ...

    def apply(self, update: Update) -> str:
        """Add an update to the base weights; return the fingerprint after it.

        Raises:
            EstuneError: not all engines can do it. The pool must then not be used any more.
        """
        ...

    def rebuild(self, records: Sequence[StepRecord], checkpoint: tuple[int, Path] | None = None) -> str:
        """Bring fresh base weights to where these steps lead; return the fingerprint there.

        Args:
            records: all steps of the run so far.
            checkpoint: a number of steps, and the directory of the weights after them, to begin with.
        """
        ...

    def save(self, path: Path, dtype: str) -> None:
        """Write the base weights as a checkpoint of this type."""
        ...

    def drift(self) -> Drift | None:
        """What restoring left behind since the last update; None if it leaves nothing."""
        ...

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """How far the base weights have come from the base model; see `Replica.compare`."""
        ...

    def close(self) -> None:
        """End all that was started."""
        ...


class Generating(Protocol):
    """What an evaluation needs: a generator, generators side by side, or a pool."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        ...

    def progress(self) -> Progress:
        """What it has done so far. May be called from any thread, while it is at work."""
        ...

    def close(self) -> None:
        """Release what it holds. Processes end at once."""
        ...


class Evaluator(Generating, Protocol):
    """What a local pool needs of a replica: `Replica`, or `WorkerProcess`, which passes calls on to one.

    The latter raises `Lost` where its process is gone or does not answer, and can be opened again.
    """

    def take(self, members: Sequence[Member], sigma: float, *, played: bool = False) -> None:
        """Make ready to generate, or to play rollouts, with these members' weights. Nobody may change the base then."""
        ...

    def complete_each(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Generate with the weights of each member that was taken, `[members][prompts]`. The base may change."""
        ...

    def apply(self, update: Update) -> int:
        """Add an update to the base, or to its share of it; return the sum of the hashes of that after it."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base, if this replica is the one that fills it."""
        ...

    def rebuild(self, updates: Sequence[Update], checkpoint: tuple[int, Path] | None = None) -> str:
        """Make a base of its own what it is after these updates; return its fingerprint."""
        ...

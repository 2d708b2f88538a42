"""Whether a run is what its journal says: its steps are taken again, and every fingerprint and checkpoint compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.journal.replay import steps_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import is_checkpoint
from estune.weights.rebuild import Told, unheard
from estune.weights.tensors import Tensor, convert, stored_type
from estune.weights.trained import Array


@dataclass(frozen=True)
class Proof:
    """What `verify` has found to be so."""

    run: Path
    base: Path  # the base model, whose content has the hash that the journal was written over
    steps: int  # of the run, and of those that it goes on from
    fingerprints: int  # recorded ones, each of which is that of the weights there
    checkpoints: dict[str, int]  # those that lie beside the journal and hold these weights, each with its step
    sha256: str  # of the journal and of those that it goes on from: who knows it knows whether one is changed
    missing: str | None  # what is missing of the run that it set out to be


def verify(run: str | Path, model: str | None = None, told: Told = unheard) -> Proof:
    """Take a run's steps again from its base model, and compare all that was recorded of the weights.

    Args:
        run: its directory, or its journal in the compact form.
        model: the base model, where it now lies elsewhere than the journal says.
        told: hears what share is done, 0 to 1.

    Returns:
        What is proven by it. That the rewards were what the journal says is not: only training again tells.

    Raises:
        EstuneError: naming the first step whose fingerprint is another, or the checkpoint and the tensor that are not
            what the journal gives; where the journal is damaged, or the base model is another.
    """
    journal = Journal.read(Path(run))
    header = journal.header
    base = base_checkpoint(header, model or journal.base_model())
    copies = [_Copy(*each, journal, base) for each in _beside(journal)]
    inherited = len(journal.inherited)

    def look(tensor: Tensor, start: int, number: int, weights: Array) -> None:
        for copy in copies:
            copy.compare(tensor, start, number - inherited, weights)

    found = steps_of(journal).fingerprints(base, header.tensors, told, look)
    recorded = [(inherited, header.fingerprint)]
    recorded += [(number, record.fingerprint) for number, record in enumerate(journal.history, 1)]
    for number, fingerprint in sorted(recorded):
        if found[number] != fingerprint:
            where = f"after step {number - inherited}" if number > inherited else "of the weights that it starts from"
            raise EstuneError(
                f"{run}: the fingerprint {where} is {found[number]} by replay, the journal says {fingerprint}: these "
                "steps do not give the weights that it was written of"
            )
    for copy in copies:
        copy.refuse_difference()
    checkpoints = {copy.folder.name: max(copy.steps) for copy in copies}
    missing = journal.shortfall()
    return Proof(Path(run), base.path, len(found) - 1, len(recorded), checkpoints, journal.sha256(), missing)


def _beside(journal: Journal) -> Iterator[tuple[Path, set[int], str]]:
    """The checkpoints in a run's directory: the folder, after which steps it can have been saved, and its type."""
    run = journal.run
    header = journal.header
    done = len(journal.steps)
    steps = {"final": {done}} | ({} if journal.best is None else {"best": {journal.best.step}})
    for name, step in steps.items():
        if (run / name).is_dir():
            yield run / name, step, header.save_dtype
    for number in range(1, done + 1):
        if (run / f"checkpoint-{number}").is_dir():
            yield run / f"checkpoint-{number}", {number}, header.dtype
    if is_checkpoint(run):  # a run that was pulled from the hub, which is its checkpoint itself
        yield run, set(range(done + 1)), header.save_dtype


class _Copy:
    """A checkpoint that is to hold a run's weights after one of some steps."""

    def __init__(self, folder: Path, steps: set[int], dtype: str, journal: Journal, base: Checkpoint) -> None:
        self.folder = folder
        self.steps = steps  # those whose weights it can be, by what was compared so far
        self._likeliest = max(steps)
        self._only = len(steps) == 1
        self._last = ""  # the tensor that was found to be another last
        self._dtype = stored_type(dtype)
        self._tied = journal.header.tensors
        trained = {name for primary, aliases in self._tied.items() for name in (primary, *aliases)}
        self._whole = base.wrote(folder, trained, dtype, journal.header.rule.grid)
        self._tensors = Checkpoint(folder).tensors if self._whole else {}
        others = [name for name in self._tensors if name not in trained]
        self._other = [n for n in others if any(a != b for a, b in _raw(self._tensors[n], base.tensors[n]))]

    def compare(self, tensor: Tensor, start: int, step: int, weights: Array) -> None:
        """Compare some elements of a tensor with what they are after a step by replay."""
        if step not in self.steps or not self._whole:
            return
        for name in (tensor.name, *self._tied[tensor.name]):
            stored = self._tensors[name].stored(start, len(weights))
            if stored.tobytes() != convert(weights, self._dtype).tobytes():
                self.steps.discard(step)
                self._last = name

    def refuse_difference(self) -> None:
        """Raise where anything is another."""
        again = f"make it again with `estune replay RUN --step {self._likeliest} -o DIR`"
        if not self._whole:
            raise EstuneError(
                f"{self.folder} is not the checkpoint that the run saved: a file is missing or another; {again}"
            )
        if self._other or not self.steps:
            other = self._other[0] if self._other else self._last
            after = f"after step {self._likeliest}" if self._only else "after any step"
            raise EstuneError(f"{self.folder}: tensor {other} is not what the journal gives {after}; {again}")


def _raw(one: Tensor, other: Tensor) -> Iterator[tuple[bytes, bytes]]:
    return zip(one.raw(), other.raw(), strict=True)

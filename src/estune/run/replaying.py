"""Brings a pool's weights to where a journal ends, and makes again the checkpoints that a run has lost."""

from __future__ import annotations

from pathlib import Path

from estune.errors import EstuneError
from estune.files import remove
from estune.journal.journal import Journal
from estune.journal.replay import holds, rebuild
from estune.pool.base import Description, Pool
from estune.pool.waiting import told_while
from estune.run.directory import RunDirectory
from estune.weights.checkpoint import Checkpoint
from estune.weights.integers import in_window
from estune.weights.moments import has_moments


def inherit(pool: Pool, trained: Description, parent: Journal) -> str:
    """Bring fresh weights to where another run ended; return the fingerprint there.

    Args:
        pool: whose weights they are.
        trained: what it trains.
        parent: the other run's journal.

    Raises:
        EstuneError: the other run began with other weights, or its steps lead elsewhere here.
    """
    for what, here, there in (
        ("base model is", trained.base_hash, parent.header.base_hash),
        ("base weights are", trained.dtype, parent.header.dtype),
        ("live weights are", trained.live_dtype, parent.header.live_dtype),
        ("scales of noise are", trained.rule.scales, parent.header.scales),
        ("grid of integers is", trained.rule.grid, parent.header.rule.grid),
        ("trained tensors are", sorted(trained.tensors), sorted(parent.header.tensors)),
    ):
        if here != there:
            raise EstuneError(
                f"{parent.run}: its {what} {there}, here {here}; go on where it was run, with its settings"
            )
    found = pool.rebuild(parent.history)
    if found != parent.fingerprint():
        raise EstuneError(
            f"{parent.run}: its {len(parent.history)} steps give fingerprint {found} here, its "
            f"journal says {parent.fingerprint()}; go on where it was run"
        )
    return found


def refuse_other_weights(trained: Description, journal: Journal, device: str) -> None:
    """Refuse to go on with a run where the base model, what of it is trained, or the live weights' type is another.

    Args:
        trained: what the pool trains.
        journal: the run's.
        device: that the settings name.
    """
    header = journal.header
    if trained.base_hash != header.base_hash:
        raise EstuneError(
            f"{journal.run}: workers have another base model, {trained.base_hash}, than the run began with, "
            f"{header.base_hash}; put the original where they load it from"
        )
    if other := sorted(trained.tensors.keys() ^ header.tensors.keys()):
        does = "trains" if other[0] in header.tensors else "does not train"
        raise EstuneError(
            f"{journal.run}: the run {does} {other[0]}, and here train_parameters="
            f"{journal.settings.get('train_parameters')} means otherwise; resume it with the estune that it began with"
        )
    if trained.live_dtype != header.live_dtype:
        raise EstuneError(
            f"{journal.run}: the run generates with {header.live_dtype} weights, which here, on {device}, "
            f"are loaded as {trained.live_dtype}; resume it on the kind of device that it began on"
        )


def replay_all(pool: Pool, run: RunDirectory, journal: Journal, base: Checkpoint, *, anew: bool = False) -> None:
    """Bring the weights to the journal's last step, from the latest checkpoint that is there.

    Of a run with moments, which checkpoints do not hold, all steps are made again. Of one with integer weights a
    checkpoint will do that was saved where a window ended.

    Args:
        pool: whose weights they are.
        run, journal, base: the run, and the model that it began with.
        anew: the weights are not the base model's as yet, but some step's.

    Raises:
        EstuneError: the steps lead elsewhere than the journal says.
    """
    done = len(journal.steps)
    dtype = journal.header.dtype
    before = len(journal.inherited)
    whole = (s for s in run.checkpoints() if s <= done and not in_window(journal.header.rule, before + s))
    sound = (s for s in whole if holds(run.checkpoint(s), base, journal, dtype))
    start = 0 if has_moments(record.update for record in journal.history) else next(sound, 0)
    checkpoint = (before + start, run.checkpoint(start)) if start else None
    with told_while(f"replaying {done - start} steps"):
        found = pool.rebuild(journal.history, checkpoint or ((0, base.path) if anew else None))
    if found != journal.fingerprint():
        where = f"checkpoint-{start} and " if start else ""
        raise EstuneError(
            f"{run.path}: {where}{done - start} replayed steps give fingerprint {found}, the journal says "
            f"{journal.fingerprint()}" + (f"; remove checkpoint-{start} and resume" if start else "")
        )


def remake_lost(run: RunDirectory, journal: Journal, base: Checkpoint, step: int) -> None:
    """Write again what a kill or a power cut has taken of checkpoints up to a step, and of `best`."""
    dtype = journal.header.dtype
    for saved in run.checkpoints():
        path = run.checkpoint(saved)
        if saved <= step and not holds(path, base, journal, dtype):
            _remake(path, saved, journal, base, dtype)
    best = journal.best
    dtype = journal.header.save_dtype
    if best is not None and not holds(run.best, base, journal, dtype, best.step):
        _remake(run.best, best.step, journal, base, dtype)


def _remake(path: Path, step: int, journal: Journal, base: Checkpoint, dtype: str) -> None:
    """Write the checkpoint of a step that the run has left behind."""
    remove(path)
    rebuild(journal, base, path, step, dtype)

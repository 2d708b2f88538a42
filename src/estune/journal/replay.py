"""Rebuild the checkpoint of any step from the base checkpoint and the journal, without an engine.

Works tensor by tensor, a run of a million elements at a time: the memory needed does not grow with the model. The
result is compared with the fingerprint that the trained weights had.
"""

from __future__ import annotations

from pathlib import Path

from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.identity import QUANTISED, changed_settings, model_files, refuse_changes
from estune.journal.journal import Journal
from estune.weights.checkpoint import Checkpoint
from estune.weights.policies import TYPE_NAMES
from estune.weights.rebuild import Steps, Told, unheard
from estune.weights.tensors import PACKED, narrow, stored_type, widen

PROBED_TENSORS = 16  # about so many, of
PROBED_ELEMENTS = 256  # elements, tell one step's checkpoint from another's


def replay(
    run: Path,
    output: Path,
    step: int | None = None,
    model: str | None = None,
    dtype: str | None = None,
    *,
    accept_changes: bool = False,
    told: Told = unheard,
) -> str:
    """Write the weights after `step` steps as a Hugging Face checkpoint.

    Args:
        run: a run's directory, or its journal in the compact form.
        output: directory to make; refused if there is one already.
        step: how many of the run's steps to take, all by default; 0 gives the weights that it started from.
        model: the base model, where it now lies elsewhere than the journal says.
        dtype: type to store, or `packed`, for integer weights; by default that of the run's `best` and `final`.
        accept_changes: take the base model's configuration and tokenizer as they are now.
        told: hears what share is done, 0 to 1.

    Returns:
        The fingerprint, which equals the one recorded.

    Raises:
        EstuneError: for a step that is not there, an unknown type, another base model, or weights that do not match
            the record.
    """
    journal = Journal.read(run, step)
    header = journal.header
    step = len(journal.steps)
    dtype = dtype or header.save_dtype
    known = (*TYPE_NAMES, *((PACKED,) if header.rule.grid else ()))
    if dtype not in known:
        raise EstuneError(f"dtype: {dtype!r} is no type of this run's checkpoints; give one of {', '.join(known)}")
    if output.exists():
        raise EstuneError(f"{output} exists already: give another directory or remove it")
    base = base_checkpoint(header, model or journal.base_model())
    refuse_changed_model(journal, base.path, accept=accept_changes)
    return rebuild(journal, base, output, step, dtype, told)


def rebuild(journal: Journal, base: Checkpoint, output: Path, step: int, dtype: str, told: Told = unheard) -> str:
    """As `replay`, of a journal that is open, over a base checkpoint that is known to be its own."""
    header = journal.header
    run = journal.run
    expected = journal.fingerprint(step)

    def verify(found: str) -> None:
        if found != expected:
            raise EstuneError(
                f"{run}: replay to step {step} gives fingerprint {found}, the journal says {expected}; nothing written"
            )

    steps_of(journal, step).write(base, header.tensors, output, dtype, verify, told)
    return expected


def holds(folder: Path, base: Checkpoint, journal: Journal, dtype: str, step: int | None = None) -> bool:
    """Whether a directory is a checkpoint of the run, stored as `dtype`, as far as a look tells that costs little.

    All files are there and of their size, those beside the weights are the base's, and the first elements of some
    tensors are what the journal makes of the base's in `step` steps, if that is given.
    """
    header = journal.header
    trained = {name: primary for primary, aliases in header.tensors.items() for name in (primary, *aliases)}
    if not base.wrote(folder, trained, dtype, header.rule.grid):
        return False
    if step is None:
        return True
    found = Checkpoint(folder).tensors
    names = sorted(name for name in found if name in trained)
    steps = steps_of(journal, step)
    for name in names[:: max(1, len(names) // PROBED_TENSORS)]:
        tensor = base.tensors[trained[name]]
        count = min(PROBED_ELEMENTS, tensor.elements)
        expected = narrow(widen(steps.rebuilt(tensor, 0, count)), stored_type(dtype))
        if found[name].read(0, count).tobytes() != widen(expected).tobytes():
            return False
    return True


def refuse_changed_model(journal: Journal, folder: Path, *, accept: bool, trained: bool = False) -> dict[str, str]:
    """Refuse a base model whose configuration, tokenizer or chat template is not what the run began with.

    Args:
        journal: the run's.
        folder: the model's.
        accept: go on all the same.
        trained: the folder is a checkpoint of the run, whose integers are stored in a way of their own.

    Returns:
        Hashes of the files that are there now, if they are others and the user accepts them; empty otherwise.

    Raises:
        EstuneError: naming the file.
    """
    run = journal.run
    apart = {QUANTISED} if trained and journal.header.rule.grid is not None else set()
    recorded, now = (
        {k: v for k, v in files.items() if k not in apart} for files in (journal.files, model_files(folder))
    )
    return refuse_changes(
        f"model {folder}",
        recorded,
        now,
        accept=accept,
        details=changed_settings(folder, (run / "best", run / "final")),
    )


def steps_of(journal: Journal, count: int | None = None) -> Steps:
    """All that lies before the journal's own steps, and so many of these; all by default."""
    records = [*journal.inherited, *journal.steps[:count]]
    return Steps(journal.header.rule, [record.update for record in records])

"""Rebuild the checkpoint of any step from the base checkpoint and the journal, without an engine.

Works tensor by tensor, a run of a million elements at a time: the memory needed does not grow with the model. The
result is compared with the fingerprint that the trained weights had.
"""

from __future__ import annotations

from pathlib import Path

from estune.errors import EstuneError
from estune.journal.journal import Journal, base_checkpoint
from estune.weights.policies import TYPE_NAMES
from estune.weights.rebuild import Steps


def replay(run: Path, output: Path, step: int | None = None, model: str | None = None, dtype: str | None = None) -> str:
    """Write the weights after `step` steps as a Hugging Face checkpoint.

    Args:
        run: a run's directory.
        output: directory to make; refused if there is one already.
        step: how many of the run's steps to take, all by default; 0 gives the weights that it started from.
        model: the base model, where it now lies elsewhere than the journal says.
        dtype: type to store, by default the one the run generated with.

    Returns:
        The fingerprint, which equals the one recorded.

    Raises:
        EstuneError: for a step that is not there, an unknown type, another base model, or weights that do not match
            the record.
    """
    journal = Journal.read(run)
    header = journal.header
    step = len(journal.steps) if step is None else step
    if not 0 <= step <= len(journal.steps):
        raise EstuneError(
            f"{run} has {len(journal.steps)} steps, not {step}: give --step from 0 to {len(journal.steps)}"
        )
    dtype = dtype or header.live_dtype
    if dtype not in TYPE_NAMES:
        raise EstuneError(f"dtype: {dtype!r} is unknown; give one of {', '.join(TYPE_NAMES)}")
    if output.exists():
        raise EstuneError(f"{output} exists already: give another directory or remove it")
    base = base_checkpoint(header, model)
    steps = [*journal.inherited, *journal.steps[:step]]
    expected = journal.steps[step - 1].fingerprint if step else header.fingerprint

    def verify(found: str) -> None:
        if found != expected:
            raise EstuneError(
                f"{run}: replay to step {step} gives fingerprint {found}, the journal says {expected}; nothing written"
            )

    replayed = Steps(header.rule, [record.update for record in steps], [record.sigma for record in steps])
    replayed.write(base, header.tensors, output, dtype, verify)
    return expected

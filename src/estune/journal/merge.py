"""Several runs over one base in one: the sum of what each of them did to the weights, itself a journal.

An update adds noise to the weights, whatever they are. So the steps of one run and then those of another, each with its
coefficients times a weight, add up to the weighted sum of both changes, and are a run that replays like any other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from estune.errors import EstuneError
from estune.es.earlier import scaled
from estune.es.strategy import Update
from estune.files import make_folder
from estune.journal.base import base_checkpoint
from estune.journal.identity import model_files
from estune.journal.journal import Journal
from estune.journal.records import FORMAT, Header, StepRecord
from estune.journal.replay import rebuild
from estune.versions import packages
from estune.weights.policies import bits_of
from estune.weights.rebuild import Steps, Told, is_anchored, unheard


def merge(
    runs: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    model: str | None = None,
    told: Told = unheard,
) -> Path:
    """Write the run that is the sum of others: a directory with a journal and `final`.

    Args:
        runs: two or more, over one base model: directories, or journals in the compact form.
        output: directory to make; refused if there is one already.
        weights: by what the change of each is multiplied; 1 by default.
        model: the base model, where it now lies elsewhere than the first journal says.
        told: hears what share is done, 0 to 1.

    Returns:
        The directory. What is evaluated there, `evaluate_model` tells, of `final`.

    Raises:
        EstuneError: the runs have no sum: they have other base models or trained tensors, keep their weights in another
            way, or in one that makes what a step does depend on the weights that it finds (weight decay, `inplace`).
    """
    output = Path(output)
    factors = [1.0] * len(runs) if weights is None else list(weights)
    if len(runs) < 2 or len(factors) != len(runs):
        raise EstuneError(
            f"merge: {len(runs)} runs and {len(factors)} weights: give two runs or more, a weight for each"
        )
    if output.exists():
        raise EstuneError(f"{output} exists already: give another directory or remove it")
    journals = [Journal.read(Path(run)) for run in runs]
    for journal in journals:
        _refuse_other(journals[0], journal)
    first = journals[0].header
    base = base_checkpoint(first, model or journals[0].base_model())
    together = [(r, factor) for journal, factor in zip(journals, factors, strict=True) for r in journal.history]
    records: list[StepRecord] = []
    for record, factor in together:
        records.append(_scaled(record, records, factor))
    steps = Steps(first.rule, [r.update for r in records])
    found = steps.fingerprints(base, first.tensors, lambda share: told(share / 2))
    header = Header(
        model=journals[0].base_model() if model is None else os.path.abspath(model),
        base_hash=first.base_hash,
        policy=first.policy,
        rounding=first.rounding,
        noise=first.noise,
        dtype=first.dtype,
        live_dtype=first.live_dtype,
        tensors=first.tensors,
        scales=first.scales,
        fingerprint=found[0],
        task="+".join(dict.fromkeys(journal.header.task for journal in journals)),
        data_hash="",
        config={
            **journals[0].settings,
            "steps": len(records),
            "start_from": None,
            "start_step": None,
            "output_dir": str(output),
            "merged": [
                {"run": os.path.abspath(j.run), "check": j.check, "weight": f}
                for j, f in zip(journals, factors, strict=True)
            ],
        },
        packages=packages(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=model_files(base.path),
        place=os.path.abspath(output),
        folder=os.getcwd(),
        format=FORMAT,
    )
    make_folder(output)
    merged = Journal.create(output, header)
    try:
        for record, fingerprint in zip(records, found[1:], strict=True):
            merged.append_step(replace(record, fingerprint=fingerprint))
        rebuild(merged, base, output / "final", len(records), header.save_dtype, lambda share: told(0.5 + share / 2))
        merged.append_end("finished")
    finally:
        merged.close()
    return output


def _refuse_other(one: Journal, other: Journal) -> None:
    """Refuse runs that have no sum."""
    a = one.header
    b = other.header
    for what, here, there in (
        ("base model is", a.base_hash, b.base_hash),
        ("trained tensors are", sorted(a.tensors), sorted(b.tensors)),
        ("base weights are", a.dtype, b.dtype),
        ("noise is", a.noise, b.noise),
        ("scales of noise are", a.scales, b.scales),
        ("rounding is", a.rounding, b.rounding),
        ("weights are kept by", bits_of(a.policy), bits_of(b.policy)),
    ):
        if here != there:
            raise EstuneError(
                f"merge: of {one.run} the {what} {here!s:.60}, of {other.run} {there!s:.60}; give runs of one"
            )
    if b.rule.how.drifts or b.rule.grid is not None:
        raise EstuneError(
            f"merge: {other.run} was run with weights={b.policy}, where a step depends on the weights that it finds; "
            "give runs with weights=master or copy"
        )
    decayed = next((r.step + 1 for r in other.history if _depends(r.update)), None)
    if decayed is not None:
        raise EstuneError(
            f"merge: {other.run} has weight decay, an anchor or moments, from step {decayed} on, by which a step "
            "depends on what was before it: such runs have no sum; give runs without"
        )


def _depends(update: Update) -> bool:
    """Whether what an update does depends on the weights that it finds, or on the updates before it."""
    return bool(update.decay) or is_anchored(update) or update.moments is not None


def _scaled(record: StepRecord, before: Sequence[StepRecord], factor: float) -> StepRecord:
    """A step as the next one of the merged run, its coefficients times a factor."""
    coefficients = tuple(float(np.float32(factor * coefficient)) for coefficient in record.update.coefficients)
    earlier = scaled((r.update.pairs for r in reversed(before)), record.update.factors)
    return replace(
        record,
        update=replace(record.update, step=len(before), coefficients=coefficients, earlier=earlier),
        learning_rate=factor * record.learning_rate,
        metrics={},
        staleness=[],
    )

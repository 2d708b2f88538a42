"""Rebuild the checkpoint of any step from the base checkpoint and the journal, without an engine.

Works tensor by tensor, a run of a million elements at a time: the memory needed does not grow with the model. The
result is compared with the fingerprint that the trained weights had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

from estune.errors import EstuneError
from estune.es.update import Kernel, update_kernel
from estune.journal.journal import Header, Journal, StepRecord, base_checkpoint
from estune.noise import cpu
from estune.noise.reference import tensor_id
from estune.weights.checkpoint import DTYPES, RUN_LENGTH, Tensor, narrow

Array = npt.NDArray[Any]


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
    if dtype not in DTYPES:
        raise EstuneError(f"dtype: {dtype!r} is unknown; give one of {', '.join(DTYPES)}")
    if output.exists():
        raise EstuneError(f"{output} exists already: give another directory or remove it")
    base = base_checkpoint(header, model)
    steps = [*journal.inherited, *journal.steps[:step]]
    expected = journal.steps[step - 1].fingerprint if step else header.fingerprint
    fingerprints: dict[str, int] = {}

    def verify() -> None:
        found = f"{sum(fingerprints.values()) % 2**64:016x}"
        if found != expected:
            raise EstuneError(
                f"{run}: replay to step {step} gives fingerprint {found}, the journal says {expected}; nothing written"
            )

    # Once for all tensors: built for each, they would grow to tensors x steps.
    kernels = [(record, update_kernel(record.update, header.rounding)) for record in steps]
    tensors = {
        name: _rebuilt(base.tensors[primary], header, kernels, fingerprints)
        for primary, aliases in header.tensors.items()
        for name in (primary, *aliases)
    }
    base.write(output, tensors, dtype, verify)
    return expected


def _rebuilt(
    tensor: Tensor, header: Header, kernels: Sequence[tuple[StepRecord, Kernel]], fingerprints: dict[str, int]
) -> Callable[[], Iterator[Array]]:
    key = tensor_id(tensor.name)
    noise_key = 0 if header.noise == "correlated" else key

    def run(start: int) -> tuple[Array, int]:
        values = tensor.read(start, min(RUN_LENGTH, tensor.elements - start))
        weights = narrow(values, DTYPES[header.dtype])
        for record, apply in kernels:
            if header.policy == "inplace":  # what rounding left behind at each restore is part of the run
                for member in record.update.members:
                    for sigma in (member.sign * record.sigma, -member.sign * record.sigma):
                        cpu.perturb(weights, weights, member.seed, noise_key, start, sigma)
            apply(weights, noise_key, start)
        return weights, cpu.fingerprint(weights, key, start)

    def runs() -> Iterator[Array]:
        total, workers = 0, _cores()
        starts = range(0, tensor.elements, RUN_LENGTH)
        with ThreadPoolExecutor(workers) as threads:
            for i in range(0, len(starts), workers):
                for weights, part in threads.map(run, starts[i : i + workers]):
                    total += part
                    yield weights
        fingerprints[tensor.name] = total

    return runs


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""A run's weights in memory, as a plain transformers model: the base with the journal applied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from estune.engines.loading import load_model
from estune.errors import EstuneError
from estune.es.update import as_fingerprint
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.journal.replay import refuse_changed_model, steps_of
from estune.noise.reference import tensor_id
from estune.weights.device import pick_device
from estune.weights.parameters import Parameter, trained_parameters
from estune.weights.places import check_places, stretches
from estune.weights.policies import TYPE_NAMES
from estune.weights.rebuild import Told, in_order, unheard
from estune.weights.tensors import DTYPES, PACKED, convert
from estune.weights.trained import Array


def load(
    run: str | Path,
    step: int | None = None,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    accept_changes: bool = False,
    trust_remote_code: bool = False,
    told: Told = unheard,
) -> PreTrainedModel:
    """The model after some step of a run, in evaluation mode; nothing is written.

    Beside the model it takes some MB for each core.

    Args:
        run: the run's directory, or its journal in the compact form.
        step: after how many steps; all by default; 0 gives the weights that the run started from.
        model: the base model, where it now lies elsewhere than the journal says.
        dtype: float32, bfloat16 or float16; by default that of the run's `best` and `final`, float32 of packed ones.
        device: where it is to be, as torch names it.
        accept_changes: take the base model's configuration and tokenizer as they are now.
        trust_remote_code: run the code that the base model brings with it.
        told: hears what share is done, 0 to 1.

    Raises:
        EstuneError: the run has no such step, its base model is not there or another, or the weights do not have the
            recorded fingerprint.
    """
    journal = Journal.read(Path(run), step)
    header = journal.header
    dtype = dtype or ("float32" if header.save_dtype == PACKED else header.save_dtype)
    if dtype not in TYPE_NAMES:
        raise EstuneError(f"dtype: {dtype!r} is unknown; give one of {', '.join(TYPE_NAMES)}")
    base = base_checkpoint(header, model or journal.base_model())
    refuse_changed_model(journal, base.path, accept=accept_changes)
    integers = header.rule.grid is not None
    loaded: Any = load_model(base.path, dtype, pick_device("cpu"), trust_remote_code=trust_remote_code, plain=integers)
    parameters = [p for p in trained_parameters(loaded, base.tensors) if p.name in header.tensors]
    missing = next((name for name in header.tensors if name not in {p.name for p in parameters}), None)
    if missing is not None:
        raise EstuneError(f"{run}: the model that {base.path} is loaded as has no tensor {missing}")
    check_places(parameters, base)
    steps = steps_of(journal)
    whole = sum(p.tensor.numel() for p in parameters)
    pieces = [
        (p, *piece) for p in parameters for piece in stretches(partial(steps.rebuilt, base.tensors[p.name]), p.part)
    ]

    def fill(piece: tuple[Parameter, int, int, Callable[[], Array]]) -> tuple[int, int]:
        from estune.noise import cpu_sums

        parameter, first, end, rebuild = piece
        weights = rebuild()
        live = parameter.tensor.detach().view(-1)[first:end]
        live.copy_(torch.from_numpy(convert(weights, DTYPES[dtype])).view(live.dtype))
        part = parameter.part
        rows = part.layout and part.layout._replace(skip=first)
        start = part.start + (0 if rows else first)
        return cpu_sums.fingerprint(weights, tensor_id(parameter.name), start, rows), end - first

    total = 0
    done = 0
    for part, count in in_order(fill, pieces):
        total += part
        done += count
        told(done / whole)
    if as_fingerprint(total) != journal.fingerprint():
        raise EstuneError(
            f"{run}: its steps give fingerprint {as_fingerprint(total)}, the journal says {journal.fingerprint()}"
        )
    ready: PreTrainedModel = loaded.to(device).eval()
    return ready

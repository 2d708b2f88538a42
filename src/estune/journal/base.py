"""The model that a run began with, opened as its journal names it."""

from __future__ import annotations

import os

from pydantic import ValidationError

from estune.errors import EstuneError, first_line
from estune.journal.records import Header
from estune.weights.adapted import open_checkpoint
from estune.weights.adapters import Adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.gguf import is_gguf


def base_checkpoint(header: Header, model: str | None = None) -> Checkpoint:
    """The base checkpoint of a run, its content checked against the journal's hash."""
    model = model or header.model
    if os.path.isabs(model) and not is_gguf(model) and not os.path.exists(model):
        raise EstuneError(f"base model {model} is not there; say where it is now with --model")
    base = open_checkpoint(model, _adapter_of(header))
    found = base.content_hash()
    if found != header.base_hash:
        raise EstuneError(
            f"base model {model}: content hash {found}, the journal was written over "
            f"{header.base_hash}; give the original with --model"
        )
    for name, aliases in header.tensors.items():
        shapes = {each: base.tensors[each].shape if each in base.tensors else None for each in (name, *aliases)}
        if None in shapes.values() or len(set(shapes.values())) > 1:
            raise EstuneError(
                f"the journal's header names {', '.join(shapes)} as one tensor of {base.path}, which they are not; "
                "restore it from a copy"
            )
    return base


def _adapter_of(header: Header) -> Adapter | None:
    """The settings of the adapter that a run trains; None where it trains the model itself.

    Raises:
        EstuneError: the journal says something else there.
    """
    said = header.config.get("adapter")
    try:
        return None if said is None else Adapter.model_validate(said)
    except ValidationError as error:
        raise EstuneError(f"the journal's header names no adapter that is one: {first_line(error)}") from error

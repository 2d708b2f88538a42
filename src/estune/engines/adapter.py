"""An adapter in a model: PEFT's layers in place of the model's own, which hold these unchanged."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from estune.errors import EstuneError, first_line
from estune.weights.adapters import CONFIG, settings_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import ADAPTER, adapter_names


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with an adapter in place, in evaluation mode, no parameter with a gradient.

    The adapter's tensors are float32 beside weights of any type, as PEFT holds them too.

    Args:
        model: which is changed.
        folder: the adapter's directory.

    Raises:
        EstuneError: PEFT is not installed, or the adapter is none of this model's.
    """
    # PEFT imports bitsandbytes where it is installed, which then asks for a kernel of its own, whatever the model is.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise EstuneError(f"adapter {folder}: to load it install estune[peft] ({error})") from error
    settings_of(folder)  # of a method that is trained
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT's to its own authors, and of tensors, which are looked at here
            loaded = peft.PeftModel.from_pretrained(
                model, str(folder), adapter_name=ADAPTER, torch_device=str(model.device)
            )
    except Exception as error:  # whatever settings or tensors of somebody else make PEFT raise
        raise EstuneError(
            f"adapter {folder}: PEFT cannot put it into the model that its {CONFIG} names ({first_line(error):.300})"
        ) from error
    adapted = loaded.get_base_model()  # the same object, with layers of PEFT's in it
    there = set(adapter_names(adapted).values())
    given = set(Checkpoint(folder).tensors)
    if there != given:
        told = f"the model has no place for {min(given - there)}" if given - there else f"it lacks {min(there - given)}"
        raise EstuneError(f"adapter {folder} is none of the model that its {CONFIG} names: {told}")
    return adapted.eval().requires_grad_(False)

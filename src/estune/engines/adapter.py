"""An adapter in a model: PEFT's layers in place of the model's own, which hold these unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from estune.errors import EstuneError, first_line
from estune.weights.adapters import CONFIG, WEIGHTS, settings_of
from estune.weights.parameters import ADAPTER


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with an adapter in place, in evaluation mode, no parameter with a gradient.

    The adapter's tensors are float32 beside weights of any type, as PEFT holds them too.

    Args:
        model: which is changed.
        folder: the adapter's directory.

    Raises:
        EstuneError: PEFT is not installed, or the adapter is none of this model's.
    """
    try:
        import peft
        from safetensors.torch import load_file
    except ImportError as error:
        raise EstuneError(f"adapter {folder}: to load it install estune[peft] ({error})") from error
    settings_of(folder)  # of a method that is trained
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        adapted: Any = peft.inject_adapter_in_model(config, model, ADAPTER)
        own = [parameter for name, parameter in adapted.named_parameters() if f".{ADAPTER}" in name]
        for parameter in own:
            parameter.data = parameter.data.to(torch.float32)
        loaded: Any = peft.set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS), ADAPTER)
    except Exception as error:  # whatever settings or tensors of somebody else make PEFT raise
        raise EstuneError(
            f"adapter {folder}: PEFT cannot put it into the model that its {CONFIG} names ({first_line(error):.300})"
        ) from error
    lacking = [name for name in loaded.missing_keys if f".{ADAPTER}" in name]
    if lacking or loaded.unexpected_keys:
        told = f"it lacks {lacking[0]}" if lacking else f"the model has no place for {loaded.unexpected_keys[0]}"
        raise EstuneError(f"adapter {folder} is none of the model that its {CONFIG} names: {told}")
    return adapted.eval().requires_grad_(False)

"""Quantised checkpoints: a base that stays as it is under an adapter, or integers that are trained themselves.

Which methods there are, and how weights under an adapter are loaded and multiplied, is transformers' and its
integrations' to say. Here is what settings and files tell: by which method, of which matrices, and which weights
themselves are not trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estune.errors import EstuneError
from estune.weights.coded import READ, CodedTensor, unread

if TYPE_CHECKING:
    from estune.weights.checkpoint import Checkpoint

_SECTIONS = ("quantization_config", "compression_config")
KEPT = {"bitsandbytes", "gptq", "awq", "torchao"}
"""Methods whose weights stay quantised in memory.

Those of others are widened as they are loaded: FP8's by transformers, where there is no kernel for them, and
compressed-tensors' by request, as PEFT puts no adapter beside packed ones.
"""


def method_of(values: Mapping[str, Any]) -> str | None:
    """The method by which a model's weights are quantised, as its configuration calls it; None if they are not.

    Args:
        values: what its config.json holds.
    """
    found = _section(values)
    return None if found is None else _method(found)


def quantized_by(folder: Path) -> str | None:
    """As `method_of`, of a model's directory; None where it holds no config.json that can be read."""
    found = how_quantized(folder)
    return None if found is None else _method(found)


def how_quantized(folder: Path) -> Mapping[str, Any] | None:
    """How the weights in a model's directory are quantised, by its config.json; None if they are not."""
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return _section(values) if isinstance(values, dict) else None


def without(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json holds, without how weights are quantised."""
    kept = {key: value for key, value in values.items() if key not in _SECTIONS}
    return {key: without(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _section(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a config.json that tells how weights are quantised."""
    for section in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        for how in filter(None, map(section.get, _SECTIONS)):
            return how if isinstance(how, Mapping) else {}
    return None


def _method(how: Mapping[str, Any]) -> str:
    return str(how.get("quant_method") or "unknown")[:40]


def prepare(config: Any, method: str | None) -> None:
    """Have a model's weights widened on loading where an adapter could not be put beside them.

    Args:
        config: the model's configuration, as transformers reads it, which is changed.
        method: as `method_of` tells it.
    """
    if method == "compressed-tensors" and isinstance(getattr(config, "quantization_config", None), dict):
        config.quantization_config["dequantize"] = True


def refuse_quantized(checkpoint: Checkpoint, bits: int) -> None:
    """Refuse to train quantised weights that are no integers, or to train integers as anything else.

    Args:
        checkpoint: that would be trained; an adapter over such weights is none of these.
        bits: of the integers that are trained; 0 where other weights are.

    Raises:
        EstuneError: they cannot be trained so.
    """
    how = how_quantized(checkpoint.path)
    coded = any(isinstance(tensor, CodedTensor) for tensor in checkpoint.tensors.values())
    if how is None or (bits and coded):
        return
    method = _method(how)
    lacking = unread(checkpoint.stored, how) if bits and method in READ else None
    raise untrainable(checkpoint.path, method, coded=coded, lacking=lacking)


def untrainable(model: str | Path, method: str, *, coded: bool = False, lacking: str | None = None) -> EstuneError:
    """What is said of a model that is quantised by a method where its weights would be trained.

    Args:
        model: what the user calls it.
        method: as `method_of` tells it.
        coded: whether it can be trained as integers.
        lacking: for want of what it cannot, where that is known.
    """
    integers = "; train them as the integers that they are (weights=int4 or weights=int8)," if coded else "; train"
    if lacking is not None:
        integers = f", nor read as integers, as {lacking} is damaged or of a kind that is not read; train"
    return EstuneError(
        f"model {model}: its weights are quantised ({method}), which cannot be perturbed{integers} an adapter over "
        "them (adapter.rank=8), or take the model that it was made of, in bfloat16, float16 or float32"
    )


def matrix_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that a model has where it is not quantised, by their names in the model.

    Files of quantised weights hold other tensors, of other shapes. The model is laid out without memory.

    Raises:
        EstuneError: no causal language model can be made of its config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes transformers raise
        raise EstuneError(
            f"model {folder}: no causal language model can be laid out from its config.json; take one such as "
            "Qwen2ForCausalLM"
        ) from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

"""A model from a checkpoint's directory, or one clear line that says why not.

`trust_remote_code` is said at every call: where it is left open, transformers asks on standard input whether a model's
own code may run. It is True where the user has set it, and nowhere else.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from estune.engines.adapter import with_adapter
from estune.engines.memory import memory_for
from estune.engines.vision import Vision
from estune.errors import EstuneError, first_line
from estune.weights.checkpoint import Checkpoint
from estune.weights.merged import no_bars
from estune.weights.parameters import language_names, sees
from estune.weights.policies import TYPE_NAMES
from estune.weights.quantized import KEPT, prepare, quantized_by, without
from estune.weights.sizes import check_sizes
from estune.weights.tensors import Tensor

log = logging.getLogger(__name__)

_DIFFUSING = {"diffusion_gemma"}
"""Types of models that write the tokens of a block all at once, by samplers of their own."""
_WEIGHTS = "the live weights"
_LESS = "take a smaller model, dtype=bfloat16, or fewer replicas"


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """The type to load weights in. "auto" is the checkpoint's own, but float32 on a CPU.

    On a CPU float16 has no fast kernels, and a model small enough to train there is worth the exactness.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in TYPE_NAMES:
        raise EstuneError(f"dtype: {dtype!r} is unknown; use auto, {', '.join(TYPE_NAMES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """A checkpoint's config.json, of a causal language model.

    Args:
        path: the checkpoint's directory.
        trust_remote_code: run the code that the model brings, if it does.

    Raises:
        EstuneError: it cannot be read, or it is another kind of model's.
    """
    path = model_of(path)
    try:
        values, _ = PretrainedConfig.get_config_dict(path)
        check_sizes(values)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file, or one made to do harm, makes transformers raise
        raise _unreadable(path, error) from error
    if not (trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})):
        _check_causal(path, config)
    return config


def load_model(
    path: Path, dtype: str | torch.dtype, device: torch.device, *, trust_remote_code: bool = False, plain: bool = False
) -> Any:
    """A causal language model in evaluation mode, its parameters without gradients.

    Args:
        path: a checkpoint's directory, as `estune.weights.locate.locate` finds it; that of an adapter gives the
            model that it belongs to, with the adapter in place.
        dtype: as `pick_dtype` takes it.
        device: where to put it.
        trust_remote_code: as for `load_config`.
        plain: quantised matrices are widened by what `Checkpoint.tensors` reads, without their format's package.

    Raises:
        EstuneError: it cannot be read, it is not a causal language model, or weights are missing.
    """
    if (under := Checkpoint(path).under) is not None:
        model = load_model(under.path, dtype, device, trust_remote_code=trust_remote_code)
        return with_adapter(model, path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    kind = kind_of(config)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if plain and quantized_by(path) is not None:
        config = type(config).from_dict(without(config.to_dict()))
        with torch.device("meta"):  # the class itself, as the automatic one takes no tensors
            kind = type(kind.from_config(config, trust_remote_code=trust_remote_code))
        source = {"pretrained_model_name_or_path": None, "state_dict": _read_by_name(Checkpoint(path))}
    method = None if plain else quantized_by(path)
    prepare(config, method)
    try:
        with memory_for(_WEIGHTS, _LESS), no_bars():
            loaded, info = kind.from_pretrained(
                **source,
                config=config,
                dtype=pick_dtype(dtype, device),
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                # Quantised weights are laid out for the device that they are loaded on.
                **({"device_map": {"": device}} if method and device.type != "cpu" else {}),
            )
    except EstuneError:
        raise
    except Exception as error:  # as for the configuration
        raise (_unreadable(path, error) if method is None else _unsupported(path, method, error)) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EstuneError(
            f"model {path}: the checkpoint lacks {len(missing)} of the weights that its config.json calls for, "
            f"such as {missing[0]!r}; take a complete causal language model"
        )
    loaded.eval().requires_grad_(False)
    if "state_dict" in source:
        loaded.generation_config = generation_config(path, config)
    if hasattr(loaded.config, "rescale_every"):
        loaded.config.rescale_every = 0  # RWKV would halve weights in its first forward, for the sake of float16
    with memory_for(_WEIGHTS, _LESS):
        if method is not None:
            # LLM.int8() says of each product that it casts what it multiplies to float16.
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            return _settled(loaded, method, pick_dtype(dtype, device))
        for parameter in loaded.parameters():
            # Loaded weights can be the file itself, mapped: they must outlive what becomes of the file.
            parameter.data = parameter.data.to(device, copy=True)
        return loaded.to(device)


class _Unread:
    """A tensor of a checkpoint that transformers reads when it comes to it, by a slice."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, part: Any) -> torch.Tensor:
        found: torch.Tensor = torch.from_numpy(self._tensor.read()).view(self._tensor.shape)[part]
        return found


def _read_by_name(checkpoint: Checkpoint) -> dict[str, _Unread]:
    return {name: _Unread(tensor) for name, tensor in checkpoint.tensors.items()}


def _settled(model: Any, method: str, dtype: str | torch.dtype) -> Any:
    """A model that is or was quantised, in memory of its own: of one type, if nothing of it is quantised any more."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in {torch.nn.Parameter, torch.Tensor} and type(tensor.data) is torch.Tensor:
            tensor.data = tensor.data.clone()  # tensors of other types know how they lie
    widened = method not in KEPT and all(parameter.element_size() > 1 for parameter in model.parameters())
    # transformers can widen FP8 to bfloat16, whatever the type of the rest.
    return model.to(dtype) if widened and isinstance(dtype, torch.dtype) else model


def has_vision(config: Any) -> bool:
    """Whether a model is one that transformers loads to be shown pictures and text, and answers with text."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and sees(config)


def kind_of(config: Any) -> Any:
    """The class of transformers that loads a model, or makes one, of a configuration."""
    return AutoModelForImageTextToText if has_vision(config) or _is_misplaced(config) else AutoModelForCausalLM


def _is_misplaced(config: Any) -> bool:
    """Whether transformers lists a causal language model among those that are shown pictures alone, as Mistral 4."""
    name: str = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, "")
    return name.endswith("ForCausalLM") and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def language_tensors(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> set[str]:
    """Names of a checkpoint's tensors that `train_parameters=auto` trains, without loading any.

    Args:
        checkpoint: a model's, or an adapter's, all of which is trained.
        trust_remote_code: as for `load_config`.

    Raises:
        EstuneError: for a model that transformers cannot lay out.
    """
    names = set(checkpoint.tensors)
    if checkpoint.under is not None:
        return names
    config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
    if not sees(config):
        return names
    kind = kind_of(config)
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the configuration
        raise EstuneError(
            f"model {checkpoint.path}: which tensors are its language model's cannot be told ({first_line(error)}); "
            "install the version of transformers that it is for"
        ) from error
    return language_names(model, names)


def open_vision(path: Path, config: Any, *, trust_remote_code: bool = False) -> Vision | None:
    """What makes inputs of pictures; None for a model that takes text alone.

    Args:
        path: the model's directory.
        config: its configuration.
        trust_remote_code: as for `load_config`.
    """
    if not has_vision(config):
        return None

    def load_processor() -> Any:
        try:
            return AutoProcessor.from_pretrained(model_of(path), trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise EstuneError(
                f"model {path}: its processor of pictures needs another package ({first_line(error)}); pip install "
                "'estune[vision]'"
            ) from error
        except Exception as error:  # as for the configuration
            if wants_code(error):
                raise needs_code(path, "its processor") from error
            raise EstuneError(
                f"model {path}: its processor of pictures cannot be loaded ({first_line(error)}); save one there with "
                "processor.save_pretrained"
            ) from error

    return Vision(load_processor)


def model_of(path: Path) -> Path:
    """The directory of the model: of an adapter that of the model under it."""
    under = Checkpoint(path).under
    return path if under is None else under.path


def _check_causal(path: Path, config: Any) -> None:
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    architectures = config.architectures or []
    listed = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_causal = listed or has_vision(config) or _is_misplaced(config)
    if config.is_encoder_decoder or not is_causal or config.model_type in _DIFFUSING:
        found = f"model type {config.model_type!r}"
    elif architectures and not known.intersection(architectures):
        found = architectures[0]
    else:
        return
    raise EstuneError(
        f"model {path}: {found} is not a causal language model; take one such as Qwen2ForCausalLM, "
        "or train any module with estune.Weights.of"
    )


def _unreadable(path: Path, error: Exception) -> EstuneError:
    if wants_code(error):
        return needs_code(path, "it")
    why = first_line(error)
    return EstuneError(f"model {path}: cannot be loaded ({why}); check that the directory is complete")


def _unsupported(path: Path, method: str, error: Exception) -> EstuneError:
    """Of quantised weights: as a rule a package is missing, which transformers names, or there is no kernel here."""
    why = first_line(error)
    return EstuneError(
        f"model {path}: its weights are quantised ({method}), and transformers cannot load them here ({why:.300}); "
        "pip install 'estune[quantized]' or what it asks for, or take the model in another type (docs/models.md)"
    )


def wants_code(error: Exception) -> bool:
    """Whether transformers refuses a model for want of `trust_remote_code`."""
    return "trust_remote_code" in str(error)


def needs_code(path: Path, what: str) -> EstuneError:
    """The refusal of what needs a model's own code, where that is not to run."""
    return EstuneError(
        f"model {path}: {what} needs code that the model brings with it; read the .py files there and, if you trust "
        "them, set trust_remote_code to true"
    )


def generation_config(path: Path, config: Any) -> GenerationConfig:
    """A checkpoint's generation config: generation_config.json or, without that, what `config`, its config.json, says.

    Raises:
        EstuneError: it cannot be used.
    """
    path = model_of(path)
    try:
        if (path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(path)
        return GenerationConfig.from_model_config(config)
    except Exception as error:  # as for the configuration
        raise _unreadable(path, error) from error

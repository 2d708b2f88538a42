"""Model, tokenizer and end tokens from a checkpoint's directory; one clear line where that cannot be.

`trust_remote_code=False` is said at every call: where it is left open, transformers asks on standard input whether a
model's own code may run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from estune.config import Config
from estune.engines.memory import memory_for
from estune.errors import EstuneError
from estune.weights.checkpoint import locate
from estune.weights.policies import TYPE_NAMES
from estune.weights.sizes import check_sizes

if TYPE_CHECKING:
    from estune.engines.prompts import PromptEncoder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_WEIGHTS = "the live weights"
_LESS = "take a smaller model, dtype=bfloat16, or fewer replicas"


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """The type to load weights in. "auto" is the checkpoint's own, but float32 on a CPU.

    There float16 has no fast kernels, and a model small enough to train on a CPU is worth the exactness.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in TYPE_NAMES:
        raise EstuneError(f"dtype: {dtype!r} is unknown; use auto, {', '.join(TYPE_NAMES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_config(path: Path) -> Any:
    """A checkpoint's config.json, of a causal language model.

    Raises:
        EstuneError: it cannot be read, or it is another kind of model's.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(path)
        check_sizes(values)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file, or one made to do harm, makes transformers raise
        raise _unreadable(path, error) from error
    _check_causal(path, config)
    return config


def load_model(path: Path, dtype: str | torch.dtype, device: torch.device) -> Any:
    """A causal language model in evaluation mode, its parameters without gradients.

    Args:
        path: a checkpoint's directory, as `estune.weights.checkpoint.locate` finds it.
        dtype: as `pick_dtype` takes it.
        device: where to put it.

    Raises:
        EstuneError: it cannot be read, it is not a causal language model, or weights are missing.
    """
    config = load_config(path)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a second or two, of which a bar says nothing
    try:
        with memory_for(_WEIGHTS, _LESS):
            loaded, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=pick_dtype(dtype, device),
                output_loading_info=True,
                trust_remote_code=False,
            )
    except EstuneError:
        raise
    except Exception as error:  # as for the configuration
        raise _unreadable(path, error) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise EstuneError(
            f"model {path}: the checkpoint lacks {len(missing)} of the weights that its config.json calls for, "
            f"such as {missing[0]!r}; take a complete causal language model"
        )
    loaded.eval().requires_grad_(False)
    with memory_for(_WEIGHTS, _LESS):
        for parameter in loaded.parameters():
            # Loaded weights can be the file itself, mapped: they must outlive what becomes of the file.
            parameter.data = parameter.data.to(device, copy=True)
        return loaded.to(device)


def _check_causal(path: Path, config: Any) -> None:
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = f"model type {config.model_type!r}"
    elif architectures and not known.intersection(architectures):
        found = architectures[0]
    else:
        return
    raise EstuneError(f"model {path}: {found} is not a causal language model; take one such as Qwen2ForCausalLM")


def _unreadable(path: Path, error: Exception) -> EstuneError:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    return EstuneError(f"model {path}: cannot be loaded ({why}); check that the directory is complete")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's directory. Raises `EstuneError` where there is none."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise EstuneError(
            f"model {path}: no tokenizer in this directory (no tokenizer.json); save one there with "
            "tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as for the configuration; the tokenizers' library raises this very class
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise EstuneError(f"model {path}: its tokenizer cannot be loaded ({why}); save it again") from error


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every id at which a completion ends: the generation config's and the tokenizer's, sorted, maybe none."""
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    ids: set[int] = set()
    for source in (getattr(config, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
    return sorted(ids)


def pad_token(tokenizer: Any) -> int:
    """An id to fill gaps with. All of them are masked, so that any token serves where none is declared."""
    declared = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(declared or 0)


def open_encoder(config: Config) -> PromptEncoder:
    """What makes token ids of prompts, wherever the engines are; loads no weights.

    Raises:
        EstuneError: for a model whose configuration or tokenizer cannot be had.
    """
    from estune.engines.prompts import PromptEncoder

    path = locate(config.model)
    most = config.vllm_max_model_length if config.engine == "vllm" else None
    settings = load_config(path)  # first: transformers' tokenizers look at it too, and at no size of it
    return PromptEncoder(config.model, load_tokenizer(path), settings, most, config.rendering)

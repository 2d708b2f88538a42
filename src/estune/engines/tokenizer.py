"""A checkpoint's tokenizer, the tokens at which a completion ends, and what makes token ids of prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, GenerationConfig

from estune.config import Config
from estune.engines.loading import generation_config, load_config, model_of, needs_code, open_vision, wants_code
from estune.errors import EstuneError, first_line
from estune.weights.locate import locate

if TYPE_CHECKING:
    from estune.engines.prompts import PromptEncoder

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Settings of a generation config that change which tokens come and when they end, with the values that change nothing.
_RULES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), (0.0,)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("sequence_bias", "force_words_ids", "constraints"), ([], {})),
    **dict.fromkeys(("max_time", "watermarking_config", "dola_layers"), ()),
    "token_healing": (False,),
    "num_beams": (1,),
}


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's directory.

    Args:
        path: the directory.
        trust_remote_code: as for `load_config`.

    Raises:
        EstuneError: there is none, or it cannot be loaded.
    """
    path = model_of(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise EstuneError(
            f"model {path}: no tokenizer in this directory (no tokenizer.json); save one there with "
            "tokenizer.save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # as for the configuration; the tokenizers' library raises this very class
        if wants_code(error):
            raise needs_code(path, "its tokenizer") from error
        why = first_line(error)
        raise EstuneError(f"model {path}: its tokenizer cannot be loaded ({why}); save it again") from error


def warn_of_rules(name: str, found: GenerationConfig) -> None:
    """Log a warning that names the settings of a generation config that no engine obeys, if there are any.

    How tokens are sampled is for the run's settings to say; end tokens are obeyed.

    Args:
        name: what the user calls the model.
        found: its generation config.
    """
    told = [
        key for key, none in _RULES.items() if (value := getattr(found, key, None)) is not None and value not in none
    ]
    if told:
        log.warning(
            "model %s: its generation config sets %s; completions are drawn without, by the model's own probabilities",
            name,
            ", ".join(told),
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token id at which a completion ends, by generation config and tokenizer, sorted; there may be none."""
    text = model.config.get_text_config(decoder=True)
    own = getattr(model.config, "eos_token_id", getattr(text, "eos_token_id", None))  # a composite config names none
    ids: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (getattr(generation, "eos_token_id", None), own, tokenizer.eos_token_id):
        ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
    return sorted(ids)


def pad_token(tokenizer: Any) -> int:
    """A token id to pad with. Padding is masked, so that any token serves where none is declared."""
    declared = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(declared or 0)


def open_encoder(config: Config) -> PromptEncoder:
    """The encoder that makes token ids of prompts, wherever the engines are. Loads no weights.

    Raises:
        EstuneError: for a model whose configuration or tokenizer cannot be had.
    """
    from estune.engines.prompts import PromptEncoder

    path = locate(config.model)
    most = config.vllm_max_model_length if config.engine == "vllm" else None
    trust = config.trust_remote_code
    # First, as it checks sizes: transformers' tokenizers read the configuration too, without a check.
    settings = load_config(path, trust_remote_code=trust)
    warn_of_rules(config.model, generation_config(path, settings))
    tokenizer = load_tokenizer(path, trust_remote_code=trust)
    vision = open_vision(path, settings, trust_remote_code=trust)
    return PromptEncoder(config.model, tokenizer, settings, most, config.rendering, vision)

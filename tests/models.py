"""Tiny random models and a tokenizer, built where a test needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last or m['role'] != 'assistant' %}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    # Far from a usual init: else every completion repeats one token, and no comparison could fail.
    "initializer_range": 0.35,
}
# What `estune.engines.cpu` needs of the families that it decodes.
FUSABLE: dict[str, Any] = {"head_dim": 32}
# Config class and what differs from the common shape.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"tie_word_embeddings": False, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": False, "sliding_window": 16}),
    "gpt2": ("GPT2Config", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 12}),
    "phi3": ("Phi3Config", {}),
    "phi3_longrope": (
        "Phi3Config",
        {
            "hidden_size": 64,
            "original_max_position_embeddings": 32,
            # The longest waves alone would not show in so short texts.
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
            },
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": ("Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 4}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 48, "context_length": 256}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 48, "attention_window_size": 8, "num_key_value_heads": 1, "head_dim": 12},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
RECURRENT = {"mamba", "mamba2", "rwkv", "recurrent_gemma", "qwen3_next"}


def build_config(name: str, **changes: Any) -> Any:
    """The tiny config of an architecture, with `changes`."""
    kind, own = ARCHITECTURES[name]
    settings = {**_COMMON, **own, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes}
    if name in ("mamba", "mamba2", "rwkv"):  # as theirs, which know of no heads
        for unknown in ("num_attention_heads", "num_key_value_heads"):
            settings.pop(unknown)
    if name == "gpt2":
        for ours, theirs in (
            ("hidden_size", "n_embd"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
            ("max_position_embeddings", "n_positions"),
        ):
            settings[theirs] = settings.pop(ours)
        for unknown in ("num_key_value_heads", "head_dim", "intermediate_size"):
            settings.pop(unknown)
    return getattr(transformers, kind)(**settings)


def build_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of an architecture, in evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(build_config(name, **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases at 0 and norms at 1 would hide a mistake in either
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in key or "ln_" in key else 0.1))
    return model.eval().requires_grad_(False)


def build_tokenizer(*, chat: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes and a few special tokens; `<|end|>` ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>" if pad else None,
        additional_special_tokens=SPECIAL[2:],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


OWN_CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path({marker!r}).touch()
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def save_own_code(directory: Path, marker: Path) -> Path:
    """Write a random model that brings its own code, which leaves `marker` where it is run; return the directory."""
    save_model(directory, max_position_embeddings=1024)
    (directory / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    file = directory / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return directory


def save_model(directory: Path, name: str = "qwen2", *, seed: int = 0, tokenizer: Any = None, **changes: Any) -> Path:
    """Write a random model of an architecture with a tokenizer; return the directory."""
    build_model(name, seed, **changes).save_pretrained(directory)
    (tokenizer or build_tokenizer()).save_pretrained(directory)
    return directory

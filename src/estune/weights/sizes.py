"""The sizes in a model's config.json, checked before anything is made of such sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

# config.json's names of the sizes by which a model is laid out, and the largest that any model could have. Layers are
# made one by one, on any device: a thousand million of them fill the memory with their objects alone.
_MOST_LAYERS = 10_000
_MOST = 10**9
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "vocab_size", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings", "n_positions"),
)
_NESTED = ("text_config", "llm_config", "language_config", "decoder")


def check_sizes(values: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has.

    Args:
        values: what a config.json holds.

    Raises:
        ValueError: one is too large; the message names it.
    """
    limits = [*((name, _MOST_LAYERS) for name in _LAYERS), *((name, _MOST) for name in _SIZES)]
    unrotated = values.get("qk_rope_head_dim") == 0  # GLM 5 Next calls the rotated part of a head `head_dim`, too
    for name, most in limits:
        value = values.get(name)
        least = 0 if name == "head_dim" and unrotated else 1
        for size in value if isinstance(value, list) else [value]:
            if size is not None and not (type(size) is int and least <= size <= most):
                raise ValueError(f"{name} is {size!r:.40}, where a whole number from {least} to {most:,} belongs")
    for name in (*EXPERTS, "num_experts_per_tok"):
        size = values.get(name)
        if size is not None and not (type(size) is int and 0 <= size <= _MOST_LAYERS):
            raise ValueError(f"{name} is {size!r:.40}, where a whole number up to {_MOST_LAYERS:,} belongs")
    for name in _NESTED:
        if isinstance(nested := values.get(name), Mapping):
            check_sizes(nested)

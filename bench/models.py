"""Models to measure with: the embedded one, or random ones of a given size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# hidden, layers, heads, key-value heads, intermediate, vocabulary
SHAPES = {
    "1M": (128, 4, 4, 2, 384, 512),
    "25M": (384, 12, 6, 2, 1024, 8192),
    "100M": (768, 12, 12, 4, 2048, 32000),
}


def random_model(size: str, init: float = 0.05) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, of about the size named."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        initializer_range=init,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with an end and a padding token."""
    tokens = ["<|end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def embedded_or_random(directory: Path | None, scratch: Path) -> tuple[Path, str]:
    """The model directory given, else the embedded model's, else that of a random 1M model made in `scratch`.

    Returns the directory and what to call it in a result.
    """
    if directory is not None:
        return directory, str(directory)
    spec = find_spec("estune.models.tiny")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in map(Path, places):
        if (place / "model.safetensors").is_file():
            return place, "embedded"
    random_model("1M", init=0.3).save_pretrained(scratch)
    byte_tokenizer().save_pretrained(scratch)
    return scratch, "random 1M"

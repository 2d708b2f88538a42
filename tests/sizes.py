"""Models by the sizes in their config.json, and runs to reckon with, which the tests of an estimate share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from estune.study.estimate.machines import Device
from estune.study.estimate.needs import Item, Work
from estune.study.estimate.shapes import Shape

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_HALF_B = {
    **QWEN_7B,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_7B = {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
QWEN3_HALF_B = {
    **QWEN_HALF_B,
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GEMMA2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
# All weights 1,000 million, none of them embeddings; 10 layers of 10 kernels; 1,000 elements cached a token.
ROUND = Shape(
    parameters=10**9,
    trained=10**9,
    matrices=10**9,
    active=10**9,
    output=0,
    cached=1000,
    grouped=1,
    layers=10,
    hidden=1000,
    width=4000,
    vocabulary=1000,
    kernels=100,
    dtype="bfloat16",
)
# Reads 10^12 bytes, multiplies 10^15 and draws 10^11 numbers a second.
FAST = Device("fast", 80 * 10**9, 1e12, 1e15, 1e15, 1e11, 0.0, is_gpu=True, how="")


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_work(**changes: Any) -> Work:
    settings: dict[str, Any] = {
        "population": 10,
        "prompts": 4,
        "prompt_tokens": 50,
        "new_tokens": 101,
        "max_new_tokens": 101,
        "rows": 4,
        "slots": 151,
        "at_once": 1,
        "dtype": "bfloat16",
    }
    return Work(**{**settings, **changes})


def amounts(items: list[Item]) -> dict[str, float]:
    return {item.name: item.amount for item in items}

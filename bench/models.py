"""Models and prompts to measure with: the embedded model, or random ones of a given size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from estune.completion import Completion
from estune.engines.tokenizer import load_tokenizer
from estune.tasks.countdown_problems import countdown_prompt
from estune.weights.locate import locate

# hidden, layers, heads, key-value heads, intermediate, vocabulary; 1M is the embedded model's shape
SHAPES = {
    "1M": (128, 4, 4, 2, 384, 614),
    "3M": (192, 6, 6, 2, 576, 1024),
    "10M": (256, 10, 8, 2, 1024, 2048),
    "25M": (384, 12, 6, 2, 1024, 8192),
    "100M": (768, 12, 12, 4, 2048, 32000),
}
# the same of Qwen2.5's models: https://huggingface.co/collections/Qwen/qwen25
QWEN_SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "3B": (2048, 36, 16, 2, 11008, 151936),
    "7B": (3584, 28, 28, 4, 18944, 152064),
}
UNTIED = ("7B",)  # whose output layer is a matrix of its own
PADDING = "<|pad|>"


def random_model(
    size: str, init: float = 0.2, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, of about the size named.

    Weights far from a usual init, else every completion repeats one token, and no comparison could fail.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(qwen_config(size, dtype, init))
    return model.eval().requires_grad_(False)


def qwen_config(size: str, dtype: torch.dtype, init: float) -> Qwen2Config:
    """The configuration of a model of the size named, without special tokens but for padding."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = (SHAPES | QWEN_SHAPES)[size]
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=4096 if size in QWEN_SHAPES else 1024,
        initializer_range=init,
        tie_word_embeddings=size not in UNTIED,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        dtype=dtype,
    )


def save_random_model(size: str, folder: Path, end_ids: Sequence[int] = (), **made: Any) -> Path:
    """A random model with a tokenizer, on disk. Completions end at `end_ids`; without them, none ends early.

    `made`: as `random_model` takes it.
    """
    disable_progress_bar()
    model = random_model(size, **made)
    model.generation_config.eos_token_id = list(end_ids) or None
    model.save_pretrained(folder)
    byte_tokenizer(model.config.vocab_size).save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # this process would keep a GPU's memory that those it measures ask for
    return folder


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Padding, bytes, and names for all other tokens, which it decodes but never makes."""
    tokens = [PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"t{i}" for i in range(len(tokens), vocabulary)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PADDING)
    tokenizer.init_kwargs["eos_token"] = None  # written down, or who loads it adds Qwen2's own
    return tokenizer


def countdown_prompts(count: int, model: str = "tiny") -> list[list[int]]:
    """Token ids of Countdown prompts in the paper's layout, as the embedded model knows them."""
    draw = random.Random(0)
    texts = [countdown_prompt([draw.randint(1, 9) for _ in range(3)], draw.randint(1, 60)) for _ in range(count)]
    return [list(ids) for ids in load_tokenizer(locate(model))(texts)["input_ids"]]


def random_prompts(size: str, rows: int, shared: int = 8, shortest: int = 8, longest: int = 16) -> list[list[int]]:
    """Random token ids of mixed lengths behind a shared prefix, as a task's prompts share their opening."""
    draw, vocabulary = random.Random(0), (SHAPES | QWEN_SHAPES)[size][-1]
    head = [draw.randrange(1, vocabulary) for _ in range(shared)]
    tails = [[draw.randrange(1, vocabulary) for _ in range(draw.randint(shortest, longest))] for _ in range(rows)]
    return [head + tail for tail in tails]


def choose_end_ids(completions: Sequence[Completion], new_tokens: int, vocabulary: int) -> list[int]:
    """As many tokens, in a random order, as make these completions half of `new_tokens` long on average.

    A random model would hardly ever end. Tokens of the whole vocabulary, not of these completions alone: so those of
    other members end as early.
    """
    order = random.Random(0).sample(range(1, vocabulary), vocabulary - 1)
    rank = {token: place for place, token in enumerate(order)}

    def mean_length(count: int) -> float:
        lengths = [
            next((i + 1 for i, token in enumerate(c.token_ids) if rank.get(token, count) < count), new_tokens)
            for c in completions
        ]
        return sum(lengths) / len(lengths)

    low, high = 0, len(order)  # the mean length falls as the number of end tokens rises
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if mean_length(middle) > new_tokens / 2 else (low, middle)
    return sorted(order[:low])

"""Batches of token ids, drawn from the corpus without end."""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Draw = Callable[[random.Random], tuple[str, str]]

IGNORED = -100


def batch(
    tokenizer: PreTrainedTokenizerBase, draw: Draw, rng: random.Random, size: int, chat: bool
) -> tuple[Tensor, Tensor]:
    """Right-padded input ids and labels, both (size, longest); prompts and padding are IGNORED in the labels."""
    pairs = [draw(rng) for _ in range(size)]
    prompt_ids = tokenizer([in_chat(tokenizer, prompt) if chat else prompt for prompt, _ in pairs])["input_ids"]
    answer_ids = tokenizer([answer for _, answer in pairs])["input_ids"]
    rows = [p + a + [tokenizer.eos_token_id] for p, a in zip(prompt_ids, answer_ids, strict=True)]
    ids = torch.full((size, max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
    return ids, labels


def in_chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question as one user turn, up to where the answer starts."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

"""How likely a model finds given completions: one forward over prompt and completion, no decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.inference_mode()
def log_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int, logits: int
) -> list[list[float]]:
    """Log-probability (nats) of every token of every completion, given its prompt and the tokens before it.

    Args:
        model: a transformers causal language model.
        prompts, completions: token ids, one or more each.
        pad: a token to fill gaps with.
        logits: the most logits to hold at once.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
    found: list[list[float]] = [[] for _ in prompts]
    while order:
        keep = len(completions[order[0]])
        rows = 1
        while rows < len(order):
            longer = max(keep, len(completions[order[rows]]))
            if (rows + 1) * (longer + 1) * model.config.get_text_config(decoder=True).vocab_size > logits:
                break
            rows, keep = rows + 1, longer
        batch, order = order[:rows], order[rows:]
        values = _forward(model, [[*prompts[i], *completions[i]] for i in batch], keep, pad)
        for i, row in zip(batch, values, strict=True):
            found[i] = row[-len(completions[i]) :].tolist()
    return found


def _forward(model: Any, rows: Sequence[Sequence[int]], keep: int, pad: int) -> torch.Tensor:
    """Log-probabilities of the last `keep` tokens of each row, [rows, keep]; rows are filled up on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = min(keep, width - 1)
    logits = (
        model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep + 1)
        .logits[:, -keep - 1 : -1]
        .float()
    )
    chosen = logits.gather(-1, ids[:, -keep:, None]).squeeze(-1)
    found: torch.Tensor = chosen - logits.logsumexp(-1)
    return found

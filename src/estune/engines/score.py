"""How likely a model finds given completions: one forward over prompt and completion, no decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

LARGEST_EXPONENT = 700.0  # of e, in a float


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
            rows = rows + 1
            keep = longer
        batch = order[:rows]
        order = order[rows:]
        values = _forward(model, [[*prompts[i], *completions[i]] for i in batch], keep, pad)
        for i, row in zip(batch, values, strict=True):
            found[i] = row[-len(completions[i]) :].tolist()
    return found


def divergence(now: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> float:
    """Divergence of a model from its base in nats, over tokens that the model wrote.

    The mean of r - 1 - log r over all tokens, with r the base's probability over the model's (Schulman's k3, as in
    TRL): above 0 token by token and, over tokens that the model draws, right on average.

    Args:
        now, base: log-probabilities (nats) of the tokens of each completion under the model and its base.

    Returns:
        The estimate; infinite where an r is larger than any float, and NaN of no token.
    """
    logs = [
        of_base - of_now
        for ours, theirs in zip(now, base, strict=True)
        for of_now, of_base in zip(ours, theirs, strict=True)
    ]
    if not logs:
        return math.nan
    if any(log > LARGEST_EXPONENT for log in logs):
        return math.inf
    return math.fsum(math.expm1(log) - log for log in logs) / len(logs)


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

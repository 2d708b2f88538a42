"""How likely a model finds given completions: one forward over prompt and completion, no decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from estune.engines.decode import unsupported
from estune.engines.rotation import short_reach
from estune.engines.vision import Inputs, Vision

LARGEST_EXPONENT = 700.0  # beyond it, e^x is no float


@torch.inference_mode()
def log_probabilities(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logits: int,
    vision: Vision | None = None,
) -> list[list[float]]:
    """Log-probability (nats) of every token of every completion, given its prompt and the tokens before it.

    Args:
        model: a transformers causal language model.
        prompts, completions: token ids, one or more each.
        logits: how many logits to hold at once at most.
        vision: what makes inputs of pictures, for a model that is shown some.

    Returns:
        A list for each completion, with a value for each of its tokens.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    short = short_reach(model.config)
    alike = unsupported(model) is not None  # such models may compute by blocks and look beyond a row's end
    kinds = [vision.kind(prompt) if vision else () for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), kinds[i]))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    found: list[list[float]] = [[] for _ in rows]
    while order:
        count = 1
        first = len(prompts[order[0]])
        while count < len(order):
            following = order[count]
            first = min(first, len(prompts[following]))
            length = len(rows[following])
            if (alike and length > len(rows[order[0]])) or kinds[following] != kinds[order[0]]:
                break
            if short is not None and len(rows[order[0]]) <= short < length:
                break
            if (count + 1) * (length - first) * vocabulary > logits:
                break
            count = count + 1
        batch = order[:count]
        order = order[count:]
        first = min(len(prompts[i]) for i in batch)
        width = len(rows[batch[-1]])
        like = next(model.parameters())
        seen = vision.inputs([prompts[i] for i in batch], width, like) if vision else {}
        values = _forward(model, [rows[i] for i in batch], first, seen, numbered=not alike)
        for i, row in zip(batch, values, strict=True):
            found[i] = row[len(prompts[i]) - first :][: len(completions[i])].tolist()
    return found


def divergence(now: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> float:
    """Divergence of a model from its base in nats, over tokens that the model wrote.

    The mean of r - 1 - log r over all tokens, with r the base's probability over the model's (Schulman's k3, as in
    TRL): each is above 0 and, over tokens that the model draws, their mean is unbiased.

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


def _forward(model: Any, rows: Sequence[Sequence[int]], first: int, seen: Inputs, *, numbered: bool) -> torch.Tensor:
    """Log-probabilities of the tokens from position `first`, 1 or more, on: `[rows, longest - first]`.

    Rows are padded on the right, where causal attention does not look, so that no mask is needed. They are padded with
    tokens of their own, since some models warn of padding tokens. `numbered` positions are given, as decoding does:
    RoBERTa and its kin begin to count elsewhere by themselves.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=model.device)
    read = ids
    if seen and (marks := _marks(model.config)):
        # A mark that the model wrote itself stands for no picture, and would have none: another token takes its place.
        wrote = torch.isin(ids, torch.tensor(marks, device=ids.device))
        wrote[:, :first] = False
        read = torch.where(wrote, ids[:, first - 1 : first], ids)
    lean: dict[str, Any] = (
        {"logits_to_keep": width - first + 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    )
    if numbered:
        lean["position_ids"] = torch.arange(width, device=ids.device)[None]
    logits = model(read, use_cache=False, **lean, **seen).logits[:, first - 1 - width : -1].float()
    chosen = logits.gather(-1, ids[:, first:, None]).squeeze(-1)
    found: torch.Tensor = chosen - logits.logsumexp(-1)
    return found


def _marks(config: Any) -> list[int]:
    """The tokens that stand for pictures and videos in a model's prompts."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return [mark for name in names if isinstance(mark := getattr(config, name, None), int)]

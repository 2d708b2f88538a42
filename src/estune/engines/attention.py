"""PyTorch's attention for grouped queries, over keys and values as they lie in the cache.

Where several query heads share the keys and values of one, transformers' `sdpa` copies these for each query head: where
a mask is given and, before 5.23, where one token is decoded. For 14 query heads over 2 that is seven times the cache in
every layer and step. With one new token a row, the query heads that share keys and values can be the rows of one query.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "estune"
_UNDERSTOOD = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_SPECIAL = {"softcap", *inspect.signature(sdpa_attention_forward).parameters} - _UNDERSTOOD
"""Arguments that change what transformers' function computes, in the version at hand."""


def replaceable(model: Any) -> bool:
    """Whether `model` computes attention by transformers' `sdpa`, and looks it up where it can be replaced.

    Some models have an `sdpa` of their own, and some prepare another mask for what has this name.
    """
    code = sys.modules[type(model).__module__]
    return (
        model.config._attn_implementation == "sdpa"
        and getattr(code, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
        and not re.search("[\"']sdpa[\"']", inspect.getsource(code))
    )


def install(model: Any) -> None:
    """Let `model`, if it is `replaceable`, use this attention from now on. Its weights are not touched."""
    if replaceable(model):
        model.set_attn_implementation(NAME)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`: queries `[rows, heads, tokens, dim]` in, `[rows, tokens, heads, dim]` out.

    With one token a row, the query heads that share keys are the rows of one query. With more, PyTorch's kernel for
    CPUs lets query heads share keys and values under any mask. On other devices transformers shares them without a
    mask and copies them under one, and this function leaves both to it. Sums may run in another order than
    transformers', so that results differ in their last bits.

    Args:
        module: the attention layer, as for the next four.
        query: `[rows, heads, tokens, dim]`.
        key, value: `[rows, shared heads, slots, dim]`.
        attention_mask: `[rows or 1, heads or 1, tokens, slots]`, bool or additive; None is causal.
        dropout, scaling, kwargs: as transformers passes them.
    """
    rows, heads, tokens, _ = query.shape
    shared = key.shape[1]
    by_head = attention_mask is not None and attention_mask.shape[1] != 1
    ours = tokens == 1 or (attention_mask is not None and query.device.type == "cpu")
    if heads == shared or not ours or by_head or any(kwargs.get(name) is not None for name in _SPECIAL):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    if tokens == 1:
        query = query.reshape(rows, shared, heads // shared, -1)
    mixed = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=tokens > 1
    )
    return mixed.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Attention of grouped queries against its definition, and what it allocates."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401  # as modules of models have it

from estune.completion import Sampling
from estune.engines.attention import NAME, attention
from estune.engines.decode import Decoder
from estune.engines.graph import GraphDecoder
from tests.engines.test_decode import decode, model_of, random_prompts
from tests.models import VOCABULARY, build_model

ROWS, SLOTS, DIM = 3, 11, 8
OPTIONS = inspect.signature(sdpa_attention_forward).parameters


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """In float64, one query head after the other: `[rows, tokens, heads, dim]`."""
    group = query.shape[1] // key.shape[1]
    found = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().mT * DIM**-0.5
        weights = (scores + bias[:, head if bias.shape[1] > 1 else 0]).softmax(-1)
        found.append(weights @ value[:, head // group].double())
    return torch.stack(found, dim=2)


def grouped(heads: int, shared: int) -> torch.nn.Module:
    """What transformers' function reads of a layer."""
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (14, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", [None, "bool", "float", "float of one row", "float of each head"])
def test_attends_as_defined(heads: int, shared: int, tokens: int, kind: str | None) -> None:
    query = torch.randn(ROWS, tokens, heads, DIM).transpose(1, 2)
    slots = SLOTS if kind or tokens == 1 else tokens  # without a mask, several tokens are all there is
    key, value = (torch.randn(ROWS, shared, SLOTS, DIM)[:, :, :slots] for _ in range(2))
    shape = (1 if kind == "float of one row" else ROWS, heads if kind == "float of each head" else 1, tokens, slots)
    seen = torch.rand(shape) < 0.7
    seen[..., 0] = True
    if kind is None:
        seen = torch.ones(shape, dtype=torch.bool).tril(slots - tokens)
    bias = torch.zeros(shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {None: None, "bool": seen}.get(kind, bias)
    found, none = attention(grouped(heads, shared), query, key, value, mask)
    assert none is None
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), by_definition(query, key, value, bias.double()), rtol=0, atol=1e-6)


@pytest.mark.skipif("position_bias" not in OPTIONS, reason="transformers of this version knows no such option")
def test_what_else_changes_attention_is_left_to_transformers() -> None:
    query, key = torch.randn(ROWS, 4, 1, DIM), torch.randn(ROWS, 2, SLOTS, DIM)
    bias = torch.randn(1, 4, 1, SLOTS)
    call = (grouped(4, 2), query, key, key, None)
    expected = sdpa_attention_forward(*call, position_bias=bias)[0]
    assert not torch.allclose(expected, attention(*call)[0])
    assert torch.equal(attention(*call, position_bias=bias)[0], expected)


def test_scores_are_scaled_as_asked() -> None:
    query, key = torch.randn(ROWS, 4, 1, DIM), torch.randn(ROWS, 2, SLOTS, DIM)
    found = attention(grouped(4, 2), query, key, key, None, scaling=0.1)[0]
    torch.testing.assert_close(found, attention(grouped(4, 2), query * 0.1 * DIM**0.5, key, key, None)[0])


class NamesSdpa(transformers.Qwen2ForCausalLM):  # type: ignore[misc]
    """A model whose module has its reasons to say "sdpa"."""


def test_models_with_attention_of_their_own_keep_it() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = {"vocab_size": VOCABULARY, "intermediate_size": 32, **sizes}
    own: list[Any] = [
        NamesSdpa(transformers.Qwen2Config(**config)),
        transformers.DogeForCausalLM(transformers.DogeConfig(**config)),  # an `sdpa` that adds a mask of its own
        build_model("qwen2", attn_implementation="eager"),
    ]
    for model in own:
        before = model.config._attn_implementation
        assert Decoder(model, [], 0).model.config._attn_implementation == before
    assert Decoder(build_model("qwen2"), [], 0).model.config._attn_implementation == NAME


class Largest(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that an operation makes; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        new = [x for x in new if x.untyped_storage().data_ptr() not in given]
        self.bytes = max([self.bytes, *(x.nbytes for x in new)])
        return made


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mistral"])
@pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (1, 2, 3, 3)])
def test_keys_and_values_are_never_copied(name: str, static: bool, lengths: tuple[int, ...]) -> None:
    model = copy.deepcopy(model_of(name))
    decoder = GraphDecoder(model, [], 0, None) if static else Decoder(model, [], 0)
    forward = decoder.forward
    largest: list[int] = []

    def watched(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        with Largest() as seen:
            logits = forward(ids, *rest)
        if ids.shape[1] < 10:  # neither the prefix nor, where a window lets nobody share it, whole prompts
            largest.append(seen.bytes)
        return logits

    decoder.forward = watched  # type: ignore[method-assign]
    prompts = random_prompts(lengths, prefix=180)
    decode(decoder, prompts, Sampling(4))
    keys = len(prompts) * 2 * 180 * 16 * 4  # of a layer, in bytes
    assert len(largest) >= 3
    assert max(largest) < keys

"""The one-query attention kernel against PyTorch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from estune.engines import attention as subject
from estune.engines.attention import attention
from tests.models import build_model


class Layer(torch.nn.Module):
    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


def inputs(group: int, dim: int, length: int, rows: int = 7, heads: int = 2) -> tuple[torch.Tensor, ...]:
    """Query, and keys and values that fill the first `length` of 40 slots; the rest is NaN."""
    query = 2 * torch.randn(rows, group * heads, 1, dim)
    states = torch.randn(2, rows, heads, 40, dim)
    states[..., length:, :] = math.nan
    return query, states[0, ..., :length, :], states[1, ..., :length, :]


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any, scale: float) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    return ((scores if bias is None else scores + bias).softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a call goes to PyTorch instead."""
    calls: list[int] = []
    theirs = subject.sdpa_attention_forward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(subject, "sdpa_attention_forward", count)
    return calls


@pytest.mark.parametrize(("group", "dim"), [(1, 16), (2, 32), (3, 20)])
@pytest.mark.parametrize("length", [1, 3, 4, 6, 31, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_exact_attention(group: int, dim: int, length: int, masked: bool, counted: list[int]) -> None:
    query, key, value = inputs(group, dim, length)
    bias = None
    if masked:
        bias = torch.zeros(len(query), 1, 1, length)
        for row in range(len(query)):
            bias[row, ..., : min(row, length - 1)] = torch.finfo(torch.float32).min
    found, _ = attention(Layer(group), query, key, value, bias, scaling=0.3)
    assert not counted
    torch.testing.assert_close(found.double(), exact(query, key, value, bias, 0.3), rtol=2e-6, atol=2e-6)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    query, key, value = inputs(2, 16, 12)
    for scale in (1e-6, 50.0, 1e4):
        found, _ = attention(Layer(2), query, key, value, None, scaling=scale)
        torch.testing.assert_close(found.double(), exact(query, key, value, None, scale), rtol=1e-3, atol=1e-5)


def test_everything_else_goes_to_pytorch(counted: list[int]) -> None:
    query, key, value = inputs(2, 16, 8)
    mask = torch.ones(7, 1, 1, 8, dtype=torch.bool)
    expected = exact(query, key, value, None, 0.25).float()
    calls: list[tuple[Any, ...]] = [
        (query, key, value, mask),  # not a bias
        (query, key.transpose(2, 3).contiguous().transpose(2, 3), value, None),  # another layout
        (query.expand(-1, -1, 2, -1)[:, :, :1], key[:, :1].expand(-1, 2, -1, -1), value, None),  # heads that overlap
    ]
    for n, (q, k, v, m) in enumerate(calls, 1):
        found, _ = attention(Layer(2), q, k, v, m, scaling=0.25)
        assert len(counted) == n
        if k.shape == key.shape and torch.equal(k, key):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    half = [x.bfloat16() for x in (query, key, value)]
    attention(Layer(2), *half, None, scaling=0.25)
    attention(Layer(2), query.repeat(1, 1, 5, 1), key, value, None, scaling=0.25)
    attention(Layer(2), query, key, value, None, scaling=0.25, position_bias=torch.zeros(1, 4, 1, 8))
    assert len(counted) == len(calls) + 3


def test_installed_where_it_serves_and_not_saved(tmp_path: Any) -> None:
    model = build_model("qwen2")
    subject.install(model)
    assert model.config._attn_implementation == subject.NAME
    model.save_pretrained(tmp_path)
    assert subject.NAME not in (tmp_path / "config.json").read_text()
    for other in (build_model("gemma2"), build_model("qwen2").bfloat16()):
        before = other.config._attn_implementation
        subject.install(other)
        assert other.config._attn_implementation == before

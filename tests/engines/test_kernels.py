"""The kernels of the fused decode loop against PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from estune.engines.cpu import kernels
from estune.engines.cpu.products import MANY, NONE, Products

CLOSE = {"rtol": 3e-6, "atol": 3e-6}
CACHED = {torch.float32: CLOSE, torch.bfloat16: {"rtol": 5e-3, "atol": 5e-3}}
"""How close attention is, by the type in which keys and values are cached."""


def as_array(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 48, 128])
def test_passes_equal_pytorch(dtype: torch.dtype, width: int) -> None:
    x, change, weight = torch.randn(5, width), torch.randn(5, width) * 3, torch.randn(width).to(dtype)
    out, eps = torch.empty(5, width), np.float32(1e-5)

    def normal(values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    kernels.normalize(x.numpy(), out.numpy(), as_array(weight), eps)
    torch.testing.assert_close(out.double(), normal(x.double()), **CLOSE)
    both = x.double() + change.double()
    kernels.add_normalize(x.numpy(), change.numpy(), out.numpy(), as_array(weight), eps)
    torch.testing.assert_close(x.double(), both, **CLOSE)
    torch.testing.assert_close(out.double(), normal(both), **CLOSE)

    both = torch.randn(5, 2 * width) * 20
    kernels.gate(both.numpy(), out.numpy())
    g, u = both.double().chunk(2, dim=1)
    torch.testing.assert_close(out.double(), silu(g) * u, **CLOSE)

    table, ids = torch.randn(9, width).to(dtype), torch.tensor([8, 0, 3, 3, 1])
    kernels.embed(ids.numpy(), x.numpy(), as_array(table))
    assert torch.equal(x, table[ids].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "columns"), [(1, 16, 1), (3, 48, 2), (7, 1600, 13), (8, 64, 300)])
def test_products_equal_pytorch_to_the_same_bits_in_any_blocks(
    dtype: torch.dtype, tokens: int, width: int, columns: int
) -> None:
    x = torch.randn(tokens, width)
    weight = torch.randn(columns, width).to(dtype)
    right = (x.double() @ weight.T.double()).float()
    found = []
    for block in ((3, 2), (4, 4), (1, 1), (2, 3)):
        out = np.full((tokens, columns), math.nan, np.float32)
        middle = columns // 2
        for part in ((0, middle), (middle, columns)):
            kernels.product_kernel(*block)(x.numpy(), as_array(weight), out, *part)
        torch.testing.assert_close(torch.from_numpy(out), right, rtol=1e-5, atol=1e-5 * width**0.5)
        found.append(out)
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_the_product_that_was_compiled_once_is_found_in_the_cache() -> None:
    x, weight = (torch.randn(2, 3, 32).numpy()[i] for i in range(2))
    for _ in range(2):
        product = kernels.product_kernel.__wrapped__(2, 1)  # as another process would make it
        product(x, weight, np.empty((3, 3), np.float32), 0, 3)
    assert sum(product.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [False, True])
def test_a_bias_is_added(dtype: torch.dtype, unit: bool) -> None:
    products = Products()
    products.unit, products.native = products.unit and unit, False
    x, weight, bias = torch.randn(5, 64), torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    plain, whole = (products(x.numpy(), as_array(weight), each) for each in (NONE, as_array(bias)))
    assert np.array_equal(whole, plain + bias.float().numpy())


def test_a_processor_that_multiplies_bfloat16_does_so_for_many_rows() -> None:
    products = Products()
    weight = as_array(torch.randn(30, 64).bfloat16())
    bias = as_array(torch.randn(30).bfloat16())
    x = torch.randn(MANY, 64).numpy()
    products.unit = False
    for stored in ((weight, bias), (weight,)):
        products.native = False
        exact = products(x, *stored)
        products.native = True
        assert np.array_equal(products(x[1:], *stored), exact[1:])
        rounded = products(x, *stored)
        assert not np.array_equal(rounded, exact)
        np.testing.assert_allclose(rounded, exact, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("vocabulary", [16, 61, 200])
def test_the_largest_logit_wins_and_the_first_of_equals(rounded: bool, vocabulary: int) -> None:
    logits = torch.randn(400, vocabulary) * 4
    logits = logits.bfloat16().float() if rounded else logits  # many are equal then
    logits[0] = -math.inf
    logits[1] = -5.0
    logits[2, [3, 9]] = 100.0
    best, token = np.full(400, -np.inf, np.float32), np.zeros(400, np.int64)
    for first, part in zip(range(0, vocabulary, 40), logits.split(40, dim=1), strict=True):
        if part.shape[1] >= 16:
            kernels.running_argmax(part.contiguous().numpy(), best, token, first)
    seen = logits[:, : vocabulary - (vocabulary % 40 if vocabulary % 40 < 16 else 0)]
    expected = [row.index(max(row)) for row in seen.tolist()]
    assert token.tolist() == expected


# Of each shape and type the kernels are compiled, which takes seconds.
@pytest.mark.parametrize(
    ("dtype", "group", "heads", "dim"),
    [
        *((torch.float32, *shape) for shape in [(1, 3, 32), (3, 2, 64), (4, 1, 128)]),
        *((torch.bfloat16, *shape) for shape in [(1, 3, 32), (3, 2, 64)]),
    ],
)
@pytest.mark.parametrize("shared", [0, 16, 32])
def test_attention_equals_pytorch(dtype: torch.dtype, group: int, heads: int, dim: int, shared: int) -> None:
    lengths, slots = [1, 2, 15, 16, 17, 40], 48
    cos, sin = (torch.cos(angle := torch.rand(shared + slots, dim // 2) * 6), torch.sin(angle))
    keys, values = np.empty((6, heads, 3, dim, 16)), np.empty((6, heads, slots, dim))
    shared_keys, shared_values = np.empty((1, heads, shared // 16, dim, 16)), np.empty((1, heads, shared, dim))
    kind = np.uint16 if dtype == torch.bfloat16 else np.float32
    caches = [np.full(x.shape, 0x7FC0 if kind is np.uint16 else math.nan, kind)
              for x in (keys, values, shared_keys, shared_values)]  # fmt: skip
    none, eps = np.empty(0, kind), np.float32(1e-6)
    append, attend = kernels.attention_kernels(group, dim)
    width = (group + 2) * heads * dim
    prefix = torch.randn(shared, width)
    number = np.arange(shared)
    append(number, np.zeros_like(number), number, prefix.numpy(), cos.numpy(), sin.numpy(), none, eps,
           caches[2], caches[3], 0)  # fmt: skip
    own = [torch.randn(length, width) for length in lengths]
    tokens = torch.cat(own)
    rows = np.repeat(np.arange(6), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths]) + shared
    order = np.random.default_rng(0).permutation(len(rows))  # tokens may be cached in any order
    append(np.arange(len(rows))[order], rows[order], positions[order], tokens.numpy(), cos.numpy(), sin.numpy(),
           none, eps, caches[0], caches[1], shared)  # fmt: skip
    out = torch.empty(len(rows), group * heads * dim)
    attend(tokens.numpy(), rows, positions, out.numpy(), cos.numpy(), sin.numpy(), none, eps, *caches, shared)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x.double().chunk(2, dim=-1)
        c, s = (part[: len(x), None].double() for part in (cos, sin))
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    done = 0
    for length, row in zip(lengths, own, strict=True):
        whole = torch.cat([prefix, row]).view(shared + length, -1, dim)
        q, k, v = whole.split([group * heads, heads, heads], dim=1)
        k, v = (x.to(dtype).double() for x in (rotated(k), v))  # as they are cached
        q, k, v = (x.transpose(0, 1) for x in (rotated(q), k, v))
        right = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)[shared:]
        torch.testing.assert_close(out[done : done + length].double(), right.flatten(1), **CACHED[dtype])
        done += length

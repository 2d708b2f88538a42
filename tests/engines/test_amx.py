"""Products by the processor's matrix unit, where it has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from estune.engines.cpu import amx
from estune.engines.cpu.products import Array, Products

pytestmark = pytest.mark.skipif(not amx.available(), reason="this processor has no matrix unit for bfloat16 (AMX)")


def bits(tensor: torch.Tensor) -> Array:
    """A bfloat16 tensor's own memory, of its shape."""
    found: Array = tensor.view(torch.uint16).numpy()
    return found


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 50, amx.PACK_WEIGHTS_FROM, amx.PACK_WEIGHTS_FROM + 1])
@pytest.mark.parametrize(("width", "columns"), [(32, 16), (64, 80), (576, 96), (576, 496)])
def test_products_are_those_of_rounded_activations(tokens: int, width: int, columns: int) -> None:
    x = torch.randn(tokens, width)
    weight = torch.randn(columns, width).bfloat16()
    bias = torch.randn(columns).bfloat16()
    found = Products()(x.numpy(), bits(weight), bits(bias))
    expected = x.bfloat16().double() @ weight.double().T + bias.double()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)


def test_not_a_bit_depends_on_the_rows_beside_it_nor_on_threads() -> None:
    x = torch.randn(
        amx.PACK_WEIGHTS_FROM + 44, 96
    ).numpy()  # so many that the weights are laid out, and in parts so few that not
    weight = bits(torch.randn(112, 96).bfloat16())
    whole = Products()(x, weight)
    for first, last in ((0, 1), (3, 20), (16, 50), (200, amx.PACK_WEIGHTS_FROM + 44)):
        assert np.array_equal(Products()(np.ascontiguousarray(x[first:last]), weight), whole[first:last])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert np.array_equal(Products()(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("width", "columns"), [(48, 32), (64, 30)])
def test_what_fills_no_tile_is_computed_without_the_unit(width: int, columns: int) -> None:
    x = torch.randn(5, width).numpy()
    weight = torch.randn(columns, width).bfloat16()
    products = Products()
    products.native = False
    np.testing.assert_allclose(products(x, bits(weight)), x @ weight.float().numpy().T, rtol=1e-4, atol=1e-4)

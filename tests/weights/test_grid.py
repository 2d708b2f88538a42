"""The grid of integer weights: what is on it stays, and nothing else is far from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from estune.weights.grid import LEVELS, Grid
from tests.grids import on_grid

floats = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize("bits", [8, 4])
@given(arrays.arrays(np.float32, 64, elements=floats))
def test_any_weights(bits: int, weights: Any) -> None:
    grid = Grid(bits, 16, 1)
    scales = grid.scales(weights)
    codes = grid.codes(weights, scales, LEVELS[bits])
    values = grid.values(codes, scales)
    assert np.all(scales != 0)
    assert np.all((codes >= LEVELS[bits].low) & (codes <= LEVELS[bits].high))
    # Half a step, or one for what lies opposite to the largest weight, where the range ends one code sooner.
    assert np.all(np.abs(values - weights).reshape(-1, 16) <= 1.0001 * np.abs(scales)[:, None])
    inside = (codes < LEVELS[bits].high).reshape(-1, 16)
    assert np.all((np.abs(values - weights).reshape(-1, 16) <= 0.5001 * np.abs(scales)[:, None])[inside])
    np.testing.assert_array_equal(grid.codes(values, scales, LEVELS[bits]), codes)
    np.testing.assert_array_equal(grid.values(grid.pack(codes), scales), values)


@pytest.mark.parametrize("bits", [8, 4])
def test_as_it_is_documented(bits: int) -> None:
    weights = np.random.default_rng(1).normal(0, 0.05, 6400).astype(np.float32)
    weights[:64] = 0
    grid = Grid(bits, 64, 1)
    codes, scales = on_grid(weights, 64, bits)
    np.testing.assert_array_equal(grid.scales(weights), scales)
    np.testing.assert_array_equal(grid.codes(weights, scales, LEVELS[bits]), codes)
    assert np.all(codes[:64] == 0)


def test_the_codes_of_members_fill_the_type() -> None:
    for bits, least, most in ((8, -128, 127), (4, -8, 7)):
        low, high, reach = LEVELS[bits]
        assert (low - reach, high + reach) == (least, most)


def test_bytes() -> None:
    assert Grid(8, 64, 1).bytes(6400) == 6400 + 400
    assert Grid(4, 128, 1).bytes(6400) == 3200 + 200

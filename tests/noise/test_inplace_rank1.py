"""Noise of rank one, in place and taken back: the bits of a plain perturbation, and those that were there before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import cpu_split, rank1
from estune.noise.cpu_inplace import PATCHED, Patches, perturb, restore
from estune.noise.rows import Rows, Run
from tests.noise.test_cpu_inplace import DTYPES, KEY, any_bits, bits, like_a_model, seeds, sigmas


def expected(weights: Any, seed: int, start: int, sigma: float, columns: int, rows: Rows | None = None) -> Any:
    """The perturbed weights, stretch by stretch, by the kernel that keeps a base."""
    live = np.empty_like(weights)
    for part in Run(live, weights, 1, KEY, start, rows, columns=columns).stretches():
        rank1.perturb(part.live, part.base, seed, KEY, part.start, sigma, columns)
    return live


@given(any_bits(40), seeds, st.integers(0, 300), sigmas, st.integers(2, 60))
@settings(max_examples=100, deadline=None)
def test_any_weights_come_back(weights: Any, seed: int, start: int, sigma: float, columns: int) -> None:
    live, patches = weights.copy(), Patches()
    with np.errstate(over="ignore"):
        perturb(live, patches, seed, KEY, start, sigma, columns=columns)
        assert np.array_equal(bits(live), bits(expected(weights, seed, start, sigma, columns)))
        restore(live, patches, seed, KEY, start, sigma, columns=columns)
    assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(None, 2), (None, 777), (None, 30_000), (Rows(7, 20, 3), 20), (Rows(3000, 9001, 2999), 9001)]
)
@pytest.mark.parametrize("size", [1, PATCHED + 1, 20_001])
def test_runs_of_all_layouts_come_back(dtype: Any, rows: Rows | None, columns: int, size: int) -> None:
    weights = like_a_model(dtype, size)
    live, patches = weights.copy(), Patches()
    for sigma in (0.001, 5.0, 0.004):
        perturb(live, patches, 3, KEY, 6, sigma, rows, columns=columns)
        assert np.array_equal(bits(live), bits(expected(weights, 3, 6, sigma, columns, rows)))
        restore(live, patches, 3, KEY, 6, sigma, rows, columns=columns)
        assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize("sigma", [0.001, 0.02, 1.0])
def test_halves_of_float32_weights_come_back(sigma: float) -> None:
    whole = np.random.default_rng(0).standard_normal(20_001, np.float32) * np.float32(0.02)
    upper, lower = np.empty((2, whole.size), np.uint16)
    tied = cpu_split.split(whole, upper, lower)
    upper[tied] -= 1  # as `SplitBase.untie` does
    live, patches, rounded = upper.copy(), Patches(), np.empty(whole.size, np.uint16)
    perturb(live, patches, 9, KEY, 5, sigma, None, lower, columns=300)
    rank1.perturb(rounded, whole, 9, KEY, 5, sigma, 300)
    assert np.array_equal(live, rounded)
    restore(live, patches, 9, KEY, 5, sigma, None, lower, columns=300)
    assert np.array_equal(live, upper)

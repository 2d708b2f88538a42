"""Noise of low rank, in place and taken back: the bits of a plain perturbation, and those that were there before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import cpu_split, low_rank
from estune.noise.cpu_inplace import PATCHED, Patches, perturb, restore
from estune.noise.rows import Rows, Run
from tests.noise.test_cpu_inplace import DTYPES, KEY, any_bits, bits, like_a_model, seeds, sigmas


def expected(
    weights: Any, seed: int, start: int, sigma: float, columns: int, rank: int, rows: Rows | None = None
) -> Any:
    """The perturbed weights, stretch by stretch, by the kernel that keeps a base."""
    live = np.empty_like(weights)
    for part in Run(live, weights, 1, KEY, start, rows, columns=columns).stretches():
        low_rank.perturb(part.live, part.base, seed, KEY, part.start, sigma, columns, rank)
    return live


@given(any_bits(40), seeds, st.integers(0, 300), sigmas, st.integers(2, 60), st.sampled_from([1, 2, 8]))
@settings(max_examples=100)
def test_any_weights_come_back(weights: Any, seed: int, start: int, sigma: float, columns: int, rank: int) -> None:
    live, patches = weights.copy(), Patches()
    with np.errstate(over="ignore"):
        perturb(live, patches, seed, KEY, start, sigma, columns=columns, rank=rank)
        assert np.array_equal(bits(live), bits(expected(weights, seed, start, sigma, columns, rank)))
        restore(live, patches, seed, KEY, start, sigma, columns=columns, rank=rank)
    assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        *[(None, 2, 1), (None, 777, 1), (None, 30_000, 4)],
        *[(Rows(7, 20, 3), 20, 2), (Rows(3000, 9001, 2999), 9001, 1)],
    ],
)
@pytest.mark.parametrize("size", [1, PATCHED + 1, 20_001])
def test_runs_of_all_layouts_come_back(dtype: Any, rows: Rows | None, columns: int, rank: int, size: int) -> None:
    weights = like_a_model(dtype, size)
    live, patches = weights.copy(), Patches()
    for sigma in (0.001, 5.0, 0.004):
        perturb(live, patches, 3, KEY, 6, sigma, rows, columns=columns, rank=rank)
        assert np.array_equal(bits(live), bits(expected(weights, 3, 6, sigma, columns, rank, rows)))
        restore(live, patches, 3, KEY, 6, sigma, rows, columns=columns, rank=rank)
        assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize(("sigma", "rank"), [(0.001, 1), (0.02, 4), (1.0, 1)])
def test_halves_of_float32_weights_come_back(sigma: float, rank: int) -> None:
    whole = np.random.default_rng(0).standard_normal(20_001, np.float32) * np.float32(0.02)
    upper, lower = np.empty((2, whole.size), np.uint16)
    tied = cpu_split.split(whole, upper, lower)
    upper[tied] -= 1  # as `SplitBase.untie` does
    live, patches, rounded = upper.copy(), Patches(), np.empty(whole.size, np.uint16)
    perturb(live, patches, 9, KEY, 5, sigma, None, lower, columns=300, rank=rank)
    low_rank.perturb(rounded, whole, 9, KEY, 5, sigma, 300, rank)
    assert np.array_equal(live, rounded)
    restore(live, patches, 9, KEY, 5, sigma, None, lower, columns=300, rank=rank)
    assert np.array_equal(live, upper)

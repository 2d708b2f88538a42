"""float32 weights in halves: bits against NumPy's own arithmetic, and members against the perturbed float32 weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from estune.noise import cpu
from estune.noise.cpu_inplace import PATCHED, Patches, perturb, restore
from estune.noise.cpu_split import join, split
from estune.noise.rows import Rows
from tests.noise.test_cpu_inplace import KEY, seeds, sigmas, starts

TIES = [0x0000_8000, 0x3F80_8000, 0x3F81_8000, 0xBC00_8000, 0xBC01_8000, 0x7F7E_8000, 0x7F7F_8000, 0x8000_8000]
ODD = [0, 0x8000_0000, 1, 0x8000_0001, 0x7FFF, 0x8001, 0x007F_FFFF, 0x0080_0000, 0x7F7F_FFFF, 0xFF7F_FFFF]
patterns = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(TIES + ODD), st.integers(0x3C00_0000, 0x3D80_0000))
any_weights = arrays(np.uint32, st.integers(1, 40), elements=patterns).map(lambda bits: bits.view(np.float32))


def finite(weights: Any) -> Any:
    return np.where(np.isfinite(weights), weights, np.float32(0.02))


def nearest(weights: Any) -> Any:
    """bfloat16 by its bits, to nearest, ties to even, for finite weights."""
    below = weights.view(np.uint32) & np.uint32(0xFFFF)
    above = (weights.view(np.uint32) >> 16).astype(np.int64)
    return (above + ((below > 0x8000) | ((below == 0x8000) & (above % 2 == 1)))).astype(np.uint16)


def halves(weights: Any) -> tuple[Any, Any, Any]:
    upper, lower = (np.empty(weights.size, np.uint16) for _ in range(2))
    return upper, lower, split(weights, upper, lower)


def untied(weights: Any) -> tuple[Any, Any]:
    """The halves that a member perturbs."""
    upper, lower, tied = halves(weights)
    upper[tied] -= 1
    return upper, lower


@given(any_weights)
@settings(max_examples=200)
def test_halves_are_the_nearest_and_come_together_to_the_bit(weights: Any) -> None:
    upper, lower, tied = halves(weights)
    assert np.array_equal(upper, nearest(weights))
    assert np.array_equal(lower, weights.view(np.uint32).astype(np.uint16))
    assert np.array_equal(tied, np.flatnonzero(weights.view(np.uint32) % 2**17 == 0x18000))
    upper[tied] -= 1
    assert np.array_equal(join(upper, lower).view(np.uint32), weights.view(np.uint32))


@given(any_weights.map(finite), seeds, starts, sigmas)
@settings(max_examples=200)
def test_members_have_the_bits_of_the_perturbed_float32_weights_and_any_weights_come_back(
    weights: Any, seed: int, start: int, sigma: float
) -> None:
    upper, lower = untied(weights)
    live, expected, patches = upper.copy(), np.empty_like(upper), Patches()
    for again in range(3):
        key: Any = (seed + again & 2**64 - 1, KEY, start, sigma if again != 1 else -sigma)
        with np.errstate(over="ignore"):
            perturb(live, patches, *key, lower=lower)
            cpu.perturb(expected, weights, *key)
        assert np.array_equal(live, expected)
        restore(live, patches, *key, lower=lower)
        assert np.array_equal(live, upper)


@pytest.mark.parametrize("size", [1, PATCHED, PATCHED + 1, 4097, 20_001])
@pytest.mark.parametrize("rows", [None, Rows(7, 20, 3), Rows(3000, 9001, 2999)])
def test_runs_of_all_sizes_and_layouts_come_back(size: int, rows: Rows | None) -> None:
    weights = (np.random.default_rng(size).standard_normal(size) * 0.02).astype(np.float32)
    upper, lower = untied(weights)
    live, expected, patches = upper.copy(), np.empty_like(upper), Patches()
    for sigma in (0.001, 5.0, 0.004):
        perturb(live, patches, 3, KEY, 6, sigma, rows, lower)
        cpu.perturb(expected, weights, 3, KEY, 6, sigma, rows)
        assert np.array_equal(live, expected)
        restore(live, patches, 3, KEY, 6, sigma, rows, lower)
        assert np.array_equal(live, upper)


def test_all_upper_halves_with_odd_lower_ones_come_back() -> None:
    """Also infinities and NaNs, which nothing else is asked of."""
    below = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    weights = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | below).reshape(-1).view(np.float32)
    upper, lower = untied(weights)
    live, patches = upper.copy(), Patches()
    for sigma in (0.001, 1e30):
        perturb(live, patches, 5, KEY, 0, sigma, lower=lower)
        restore(live, patches, 5, KEY, 0, sigma, lower=lower)
        assert np.array_equal(live, upper)


def test_few_weights_of_a_model_need_a_patch() -> None:
    weights = (np.random.default_rng(0).standard_normal(1 << 18) * 0.02).astype(np.float32)
    upper, lower = untied(weights)
    patches = Patches()
    perturb(upper, patches, 1, KEY, 0, 0.001, lower=lower)
    assert patches.nbytes < 0.07 * upper.nbytes

"""Perturbing in place and taking it back: the bits of a plain perturbation, and those that were there before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from estune.noise import cpu
from estune.noise.cpu_inplace import PATCHED, Patches, perturb, restore
from estune.noise.rows import Rows

KEY = 2**63 + 7
DTYPES: list[Any] = [np.uint16, np.float16, np.float32]  # bfloat16 by its bits
seeds = st.integers(0, 2**64 - 1)
starts = st.one_of(st.integers(0, 9), st.integers(2**34 - 50, 2**34 + 10))
sigmas = st.one_of(st.sampled_from([0.0, 0.001, -0.004, 1.0, 1e-45, 1e38]), st.floats(-1e3, 1e3, width=32))


def bits(weights: Any) -> Any:
    return weights.view(np.uint32 if weights.dtype == np.float32 else np.uint16)


def any_bits(size: int) -> st.SearchStrategy[Any]:
    """Weights of any bits at all: infinities, NaNs of all kinds, both zeros, subnormals."""

    def of(dtype: Any) -> st.SearchStrategy[Any]:
        integer: Any = np.uint32 if dtype is np.float32 else np.uint16
        return arrays(integer, st.integers(0, size)).map(lambda found: found.view(dtype))

    return st.sampled_from(DTYPES).flatmap(of)


def like_a_model(dtype: Any, size: int) -> Any:
    drawn = (np.random.default_rng(size).standard_normal(size) * 0.02).astype(np.float32)
    return (drawn.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else drawn.astype(dtype)


@given(any_bits(40), seeds, starts, sigmas)
@settings(max_examples=200)
def test_any_weights_come_back_from_any_perturbation(weights: Any, seed: int, start: int, sigma: float) -> None:
    live, expected, patches = weights.copy(), np.empty_like(weights), Patches()
    for again in range(2):
        with np.errstate(over="ignore"):
            perturb(live, patches, seed + again & 2**64 - 1, KEY, start, sigma)
            cpu.perturb(expected, weights, seed + again & 2**64 - 1, KEY, start, sigma)
            assert np.array_equal(bits(live), bits(expected))
            restore(live, patches, seed + again & 2**64 - 1, KEY, start, sigma)
        assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, PATCHED - 1, PATCHED, PATCHED + 1, 4096, 4097, 20_001])
@pytest.mark.parametrize("rows", [None, Rows(7, 20, 3), Rows(3000, 9001, 2999)])
def test_runs_of_all_sizes_and_layouts_come_back(dtype: Any, size: int, rows: Rows | None) -> None:
    weights = like_a_model(dtype, size)
    live, expected, patches = weights.copy(), np.empty_like(weights), Patches()
    # Patches for few, for most, and for few again, where the room is still there.
    for sigma in (0.001, 5.0, 0.004):
        perturb(live, patches, 3, KEY, 6, sigma, rows)
        cpu.perturb(expected, weights, 3, KEY, 6, sigma, rows)
        assert np.array_equal(bits(live), bits(expected))
        restore(live, patches, 3, KEY, 6, sigma, rows)
        assert np.array_equal(bits(live), bits(weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_a_float_can_be_comes_back(dtype: Any) -> None:
    """Every 16-bit float there is; of float32 every 2^16th, and some next to each."""
    every = np.arange(2**16, dtype=np.uint16)
    if dtype is np.float32:
        every = ((every.astype(np.uint32) << 16)[:, None] + np.array([0, 1, 0xFFFF], np.uint32)).reshape(-1)
    weights = every.view(dtype)
    live, patches = weights.copy(), Patches()
    for sigma in (0.001, 1e30):
        perturb(live, patches, 5, KEY, 0, sigma)
        restore(live, patches, 5, KEY, 0, sigma)
        assert np.array_equal(bits(live), bits(weights))


def test_weights_that_subtracting_gives_back_need_no_patch() -> None:
    """Multiples of 2^-7 below 1, moved by so little that they round back to themselves."""
    weights = np.full(5000, 0.5, np.float16)
    patches = Patches()
    perturb(weights, patches, 1, KEY, 0, 1e-6)
    assert patches.nbytes < 2 * (4 + 5000 // PATCHED) + 40

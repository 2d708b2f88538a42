"""Rank-one noise against the equations, in NumPy, over any stretch of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import rank1, reference
from estune.weights.tensors import narrow, widen

KEY = reference.tensor_id("model.layers.0.mlp.up_proj.weight")
SEEDS = np.array([3, 2**63 + 5, 77], np.uint64)
COEFFICIENTS = np.array([0.25, -1.5, 0.0625], np.float32)


def noise(seed: int, columns: int, start: int, count: int) -> Any:
    """a[i] * b[j] of elements from `start` on, from the noise's specification."""
    rows = (start + count - 1) // columns + 1
    a = reference.normal_by_id(seed, KEY, 0, rows)
    b = reference.normal_by_id(seed, KEY, 2**40, columns)
    return np.outer(a, b).ravel()[start : start + count]


stretches = st.tuples(st.integers(2, 5000), st.integers(0, 9000), st.integers(1, 9000))


def weights(count: int) -> Any:
    return np.random.default_rng(count).standard_normal(count, np.float32)


@given(stretches)
@settings(deadline=None)
def test_perturbing(stretch: tuple[int, int, int]) -> None:
    columns, start, count = stretch
    base = weights(count)
    live = np.empty_like(base)
    rank1.perturb(live, base, 7, KEY, start, -0.5, columns)
    assert (live == base + np.float32(-0.5) * noise(7, columns, start, count)).all()
    halves = narrow(base, "BF16")
    rank1.perturb(halves, halves, 7, KEY, start, -0.5, columns)
    exact = widen(narrow(base, "BF16")) + np.float32(-0.5) * noise(7, columns, start, count)
    assert (halves == narrow(exact, "BF16")).all()


@given(stretches)
@settings(deadline=None)
def test_updating(stretch: tuple[int, int, int]) -> None:
    columns, start, count = stretch
    base = weights(count)
    total = np.zeros(count, np.float32)
    for seed, c in zip(SEEDS, COEFFICIENTS, strict=True):
        total += c * noise(int(seed), columns, start, count)
    expected = base + (np.float32(-0.125) * base + total)
    found = base.copy()
    rank1.update(found, SEEDS, COEFFICIENTS, KEY, start, -0.125, None, columns)
    assert (found == expected).all()
    # Stochastically: the low bits of the element's word decide, as for any other noise.
    halves = narrow(base, "BF16")
    exact = widen(halves) + (np.float32(-0.125) * widen(halves) + total)
    rank1.update(halves, SEEDS, COEFFICIENTS, KEY, start, -0.125, 99, columns)
    first = start // 4
    words = reference.words(99, KEY, first, (start + count + 3) // 4 - first).ravel()[start - 4 * first :][:count]
    assert (halves == ((exact.view(np.uint32) + (words & np.uint32(0xFFFF))) >> np.uint32(16))).all()


@pytest.mark.parametrize("cut", [1, 63, 64, 1000])
def test_parts_are_the_whole(cut: int) -> None:
    base = weights(64 * 40)
    whole = base.copy()
    rank1.update(whole, SEEDS, COEFFICIENTS, KEY, 0, 0.0, None, 64)
    parts = base.copy()
    for start, part in ((0, parts[:cut]), (cut, parts[cut:])):
        rank1.update(part, SEEDS, COEFFICIENTS, KEY, start, 0.0, None, 64)
    assert (parts == whole).all()


def test_products_have_the_variance_of_normals() -> None:
    drawn = np.concatenate([noise(seed, 500, 0, 500 * 400) for seed in range(60)])
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.var() - 1) < 0.05

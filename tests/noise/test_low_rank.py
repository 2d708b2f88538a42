"""Low-rank noise against the equations, in NumPy, over any stretch of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import low_rank, reference
from estune.weights.tensors import narrow, widen

KEY = reference.tensor_id("model.layers.0.mlp.up_proj.weight")
SEEDS = np.array([3, 2**63 + 5, 77], np.uint64)
COEFFICIENTS = np.array([0.25, -1.5, 0.0625], np.float32)


SHARES = {1: 0x3F800000, 2: 0x3F3504F3, 4: 0x3F000000, 8: 0x3EB504F3}
"""One over the root of each rank, as the bits of a float32."""


def noise(seed: int, columns: int, rank: int, start: int, count: int) -> Any:
    """The sum of a[i] * b[j] of elements from `start` on, from the noise's specification."""
    rows = (start + count - 1) // columns + 1
    total: Any = None
    for k in range(rank):
        a = reference.normal_by_id(seed, KEY, k * 2**41, rows) * np.uint32(SHARES[rank]).view(np.float32)
        product = np.outer(a, reference.normal_by_id(seed, KEY, k * 2**41 + 2**40, columns))
        total = product if total is None else total + product
    return total.ravel()[start : start + count]


stretches = st.tuples(st.integers(2, 5000), st.integers(0, 9000), st.integers(1, 9000), st.sampled_from(list(SHARES)))


def weights(count: int) -> Any:
    return np.random.default_rng(count).standard_normal(count, np.float32)


@given(stretches)
def test_perturbing(stretch: tuple[int, int, int, int]) -> None:
    columns, start, count, rank = stretch
    base = weights(count)
    live = np.empty_like(base)
    low_rank.perturb(live, base, 7, KEY, start, -0.5, columns, rank)
    assert (live == base + np.float32(-0.5) * noise(7, columns, rank, start, count)).all()
    halves = narrow(base, "BF16")
    low_rank.perturb(halves, halves, 7, KEY, start, -0.5, columns, rank)
    exact = widen(narrow(base, "BF16")) + np.float32(-0.5) * noise(7, columns, rank, start, count)
    assert (halves == narrow(exact, "BF16")).all()


@given(stretches)
def test_updating(stretch: tuple[int, int, int, int]) -> None:
    columns, start, count, rank = stretch
    base = weights(count)
    total = np.zeros(count, np.float32)
    for seed, c in zip(SEEDS, COEFFICIENTS, strict=True):
        total += c * noise(int(seed), columns, rank, start, count)
    expected = base + (np.float32(-0.125) * base + total)
    found = base.copy()
    low_rank.update(found, SEEDS, COEFFICIENTS, KEY, start, -0.125, None, columns, rank)
    assert (found == expected).all()
    # Stochastically: the low bits of the element's word decide, as for any other noise.
    halves = narrow(base, "BF16")
    exact = widen(halves) + (np.float32(-0.125) * widen(halves) + total)
    low_rank.update(halves, SEEDS, COEFFICIENTS, KEY, start, -0.125, 99, columns, rank)
    first = start // 4
    words = reference.words(99, KEY, first, (start + count + 3) // 4 - first).ravel()[start - 4 * first :][:count]
    assert (halves == ((exact.view(np.uint32) + (words & np.uint32(0xFFFF))) >> np.uint32(16))).all()


@given(stretches)
@settings(max_examples=20)
def test_the_specification_in_numpy(stretch: tuple[int, int, int, int]) -> None:
    columns, start, count, rank = stretch
    found = reference.low_rank_by_id(2**64 - 1, KEY, columns, rank, start, count)
    assert np.array_equal(found.view(np.uint32), noise(2**64 - 1, columns, rank, start, count).view(np.uint32))


@pytest.mark.parametrize(("cut", "rank"), [(1, 1), (63, 2), (64, 1), (1000, 4)])
def test_parts_are_the_whole(cut: int, rank: int) -> None:
    base = weights(64 * 40)
    whole = base.copy()
    low_rank.update(whole, SEEDS, COEFFICIENTS, KEY, 0, 0.0, None, 64, rank)
    parts = base.copy()
    for start, part in ((0, parts[:cut]), (cut, parts[cut:])):
        low_rank.update(part, SEEDS, COEFFICIENTS, KEY, start, 0.0, None, 64, rank)
    assert (parts == whole).all()


@pytest.mark.parametrize(("rank", "members"), [(1, 60), (8, 10)])
def test_sums_of_products_have_the_variance_of_normals(rank: int, members: int) -> None:
    drawn = np.concatenate([noise(seed, 500, rank, 0, 500 * 400) for seed in range(members)])
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.var() - 1) < 0.05

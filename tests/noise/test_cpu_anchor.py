"""The way back to the base model, against NumPy's operations one after the other."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from estune.noise.cpu_anchor import pull

SHARE, MOST = np.float32(0.3), np.float32(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("share", "most"), [(SHARE, 0.0), (0.0, MOST), (SHARE, MOST)])
def test_the_bits_are_those_of_one_rounded_operation_after_the_other(
    dtype: torch.dtype, share: float, most: float
) -> None:
    special = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 65504.0, math.inf, -math.inf, math.nan])
    origin = torch.cat([torch.randn(1003), special]).to(dtype)
    stored = origin.view(torch.uint16).numpy() if dtype is torch.bfloat16 else origin.numpy()
    weights = (origin.float() + 0.02 * torch.randn(1011)).numpy()
    expected = weights.copy()
    with np.errstate(invalid="ignore"):
        if share:
            expected += (origin.float().numpy() - expected) * np.float32(share)
        if most:
            expected += np.clip(origin.float().numpy() - expected, -np.float32(most), np.float32(most))
    pull(weights, stored, share, most)
    assert weights.tobytes() == expected.tobytes()


def test_known_answers() -> None:
    weights: npt.NDArray[np.float32] = np.array([1.0, -1.0, 0.25, 0.0], np.float32)
    pull(weights, np.array([0.0, 1.0, 0.25, 8.0], np.float32), 0.5, 0.125)
    assert weights.tolist() == [0.375, 0.125, 0.25, 4.125]


@given(st.floats(-10, 10, width=32), st.floats(-10, 10, width=32), st.floats(0, 1, width=32))
def test_weights_that_are_at_the_origin_stay_and_the_others_come_no_further_away(a: float, b: float, s: float) -> None:
    weights = np.array([a, b], np.float32)
    pull(weights, np.array([a, a], np.float32), s, 0.5)
    assert weights[0] == np.float32(a)
    assert abs(weights[1] - np.float32(a)) <= abs(np.float32(b) - np.float32(a))

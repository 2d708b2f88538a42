"""Shares: how sure they are."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from estune.journal.shares import wilson


@pytest.mark.parametrize(("right", "count"), [(0, 4), (1, 4), (4, 4), (268, 400)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((interval.low, interval.high), abs=1e-12)

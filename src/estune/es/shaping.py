"""Shaping: from rewards to the weights that directions get. All but `raw` have mean 0 and variance 1.

So alpha means the same with each of them: the expected square of a weight is 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from estune.es.strategy import mean_and_std

Shaping = Literal["zscore", "centered_ranks", "winsorized", "elite", "raw"]

Z_EPSILON = 1e-8  # the paper's guard in (R - mean) / (std + 1e-8)


def shape(rewards: Sequence[float], how: Shaping = "zscore", share: float = 0.25) -> list[float]:
    """Weights of directions.

    A reward's own part in the mean that is taken off it changes nothing: leaving it out, the weight would be
    N / (N - 1) times as large for all, which z-scoring divides out again.

    Args:
        rewards: finite, one a member, two or more that are not all equal.
        how: `zscore` (R - mean) / std, the paper's (arXiv 2509.24372); `centered_ranks` the z-score of ranks, equal
            rewards sharing theirs (arXiv 1703.03864); `winsorized` the z-score of rewards cut off at the quantiles
            `share / 2` and `1 - share / 2`; `elite` that of 1 for the best `share` and 0 for the rest, as CMA-ES
            selects, of equals all or, where these are the worst, none; `raw` R - mean alone.
        share: of the members, for `winsorized` and `elite`.
    """
    match how:
        case "raw":
            mean, _ = mean_and_std(rewards)
            return [r - mean for r in rewards]
        case "centered_ranks":
            ordered = sorted(rewards)
            values = [(bisect_left(ordered, r) + bisect_right(ordered, r)) / 2 for r in rewards]
        case "winsorized":
            low, high = quantile(rewards, share / 2), quantile(rewards, 1 - share / 2)
            values = [min(max(r, low), high) for r in rewards]
        case "elite":
            ordered = sorted(rewards)
            least = ordered[-max(1, round(share * len(rewards)))]
            values = [float(r >= least and r > ordered[0]) for r in rewards]
        case _:
            values = list(rewards)
    mean, std = mean_and_std(values)
    return [(v - mean) / (std + Z_EPSILON) for v in values]


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between the two values around it (Hyndman and Fan's type 7)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

"""Which accuracies are shares, and are therefore shown in percent: those that lie in 0 to 1 by declaration.

And how sure such a figure is.
"""

from __future__ import annotations

import math
import re

from estune.journal.journal import Journal

NORMAL_95 = 1.959963984540054  # quantile of the standard normal distribution that 2.5% lie above
_ACCURACY = re.compile(r"(eval_|watch/.+/)accuracy(/|$)")


def is_share(journal: Journal, key: str) -> bool:
    """Whether a metric of evaluations is a share. Only `eval_accuracy`, `watch/TASK/accuracy` and their groups can be.

    In a journal that does not say so, which an older version wrote, it is one if it has never been outside 0 to 1.
    """
    declared = journal.header.shares
    if declared is not None:
        return any(key == share or key.startswith(f"{share}/") for share in declared)
    values = [e.metrics[key] for e in journal.evaluations if key in e.metrics]
    return _ACCURACY.match(key) is not None and all(0 <= value <= 1 for value in values)


def shown(value: float, share: bool) -> str:
    """An accuracy for people: a share in percent, anything else as it is."""
    return f"{value:.1%}" if share else f"{value:.4g}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share.

    Args:
        share: what was found, 0 to 1.
        count: of how many, at least 1.
    """
    z = NORMAL_95**2 / count
    middle = share + z / 2
    half = NORMAL_95 * math.sqrt((share * (1 - share) + z / 4) / count)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def with_interval(value: float, ends: tuple[float, float], share: bool) -> str:
    """An accuracy for people, and in brackets its interval."""
    return f"{shown(value, share)} [{shown(ends[0], share)}, {shown(ends[1], share)}]"

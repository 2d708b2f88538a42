"""Tables as text: rows of cells, the first of them a heading."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose first column is text and whose others are figures."""
    head, *body = rows
    aligned = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, aligned, *body))


def spread(values: Sequence[float], digits: int) -> str:
    """The mean and, for two values or more, the standard deviation of the sample; empty for no value."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):,.{digits}f}"

"""Numbers as people say them."""

from __future__ import annotations

import math

DAY = 24 * 3600.0
UNITS = {"days": DAY, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
LEAST = {"days": 1.5, "h": 1.5, "min": 1.5, "s": 0.1, "ms": -math.inf}  # of a unit, from which on a time is told in it


def duration(seconds: float) -> str:
    """A time, with two or three digits."""
    unit = next(unit for unit, size in UNITS.items() if seconds >= LEAST[unit] * size)
    value = seconds / UNITS[unit]
    if unit == "s" and value < 10:
        return f"{value:.2g} s"
    return f"{value:,.0f} {unit}" if value >= 100 or unit == "s" else f"{value:.3g} {unit}"


def amount(count: int, what: str) -> str:
    """So many of something: one step, or 2 steps.

    Args:
        count: how many.
        what: their name, of more than one: "steps", "runs of GRPO".
    """
    several, _, rest = what.partition(" ")
    one = several.removesuffix("s")
    return f"{count:,} {several if count != 1 else one}{f' {rest}' if rest else ''}"

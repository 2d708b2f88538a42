"""Numbers as people say them."""

from __future__ import annotations

DAY = 24 * 3600.0
UNITS = {"days": DAY, "h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
LEAST = {"days": 1.5, "h": 1.5, "min": 1.5, "s": 1.0}  # of a unit, from which on a time is told in it


def duration(seconds: float) -> str:
    """A time, with three digits."""
    unit = next((unit for unit, least in LEAST.items() if seconds >= least * UNITS[unit]), "ms")
    value = seconds / UNITS[unit]
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def amount(count: int, what: str) -> str:
    """So many of something: one step, or 2 steps.

    Args:
        count: how many.
        what: their name, of more than one: "steps", "runs of GRPO".
    """
    several, _, rest = what.partition(" ")
    one = several.removesuffix("s")
    return f"{count:,} {several if count != 1 else one}{f' {rest}' if rest else ''}"

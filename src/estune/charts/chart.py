"""Charts as SVG that stretches to any width, with text beside it that does not.

The drawing's box is 1000 x 1000 and stretched (`preserveAspectRatio="none"`); strokes keep their width, and the labels
are HTML placed in percent. So one drawing serves a phone, a desk and paper, with no script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("chart.css")
"""Styles of a drawing's elements, on a page and in a picture."""
COLOURS = 8
SHADES = 8
ROWS = 24  # of a chart's table


@dataclass(frozen=True)
class Series:
    """Values along the steps. A band, and each whisker, reaches from `low` to `y`.

    A button shows and hides all elements of the same `owner`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"
    """line, thin, dots (and a line), points, whiskers, band, wide (a lighter band), area, silent (in tables)"""
    low: Sequence[float] = ()
    owner: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heat map, in the chart's units; strength from 0 to 1."""

    left: float
    right: float
    bottom: float
    top: float
    strength: float


@dataclass(frozen=True)
class Tick:
    """A label, and where it stands, in percent."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart over the steps; what it holds must not be empty."""

    name: str  # unique in the page
    title: str
    series: Sequence[Series]
    measured: str  # what stands upwards, with its unit
    along: str = "step"  # what stands along it, with its unit
    note: str = ""
    percent: bool = False
    cells: Sequence[Cell] = ()
    buttons: bool = True  # its own legend; False where the page has one
    from_zero: bool = False

    @cached_property
    def span(self) -> tuple[float, float]:
        """First and last step shown."""
        xs = [x for s in self.series for x in s.x] + [c.right for c in self.cells]
        low = min([0.0, *xs])
        high = max(xs)
        return low, high if high > low else low + 1

    @cached_property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest value shown, with some room."""
        drawn = [s for s in self.series if s.kind != "silent"]
        values = [v for s in drawn for v in (*s.y, *s.low)] + [e for c in self.cells for e in (c.bottom, c.top)]
        low = min(values)
        high = max(values)
        if self.from_zero or (low >= 0 and low < 0.35 * high):
            low = min(low, 0.0)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        top = high + room
        if self.percent and high <= 1:
            top = min(top, 1.0) if high < 1 else 1.02
        return (low if low == 0 else low - room), top

    @property
    def x_ticks(self) -> list[Tick]:
        """Labels of the steps."""
        low, high = self.span
        ticks = [t for t in _nice(low, high, 5) if t == int(t)]
        return [Tick(round(self._x(t) / 10, 2), f"{t:g}") for t in ticks]

    @property
    def y_ticks(self) -> list[Tick]:
        """Labels of the values."""
        return [Tick(round(100 - self._y(t) / 10, 2), self._tick(t)) for t in _nice(*self.levels, 4)]

    @property
    def svg(self) -> str:
        """The drawing's elements, which hold nothing but numbers and our own names."""
        lines = "".join(f'<path class="grid" d="M0 {_n(1000 - 10 * t.at)}H1000"/>' for t in self.y_ticks)
        return lines + self._heat() + "".join(self._draw(s) for s in self.series)

    @property
    def legend(self) -> list[Series]:
        """One series for each owner."""
        found: dict[str, Series] = {}
        for s in self.series:
            if s.kind != "silent":
                found.setdefault(s.owner, s)
        return list(found.values()) if self.buttons and len(found) > 1 else []

    @cached_property
    def points(self) -> list[float]:
        """All steps with a value."""
        return sorted({x for s in self.series for x in s.x})

    @property
    def texts(self) -> list[list[str]]:
        """For each series, its value at each of `points` as text; empty where it has none."""
        columns = []
        for s in self.series:
            at = {x: self._text(s, i) for i, x in enumerate(s.x)}
            columns.append([at.get(x, "") for x in self.points])
        return columns

    @property
    def data(self) -> str:
        """What the script needs to show values, as JSON that no text in it can end early."""
        low, high = self.span
        series = [
            {"name": s.name, "owner": s.owner, "colour": s.colour, "text": texts}
            for s, texts in zip(self.series, self.texts, strict=True)
        ]
        return to_json({"span": [low, high], "x": self.points, "series": series})

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """The figures as a table of some of the steps, with the first and the last."""
        count = len(self.points)
        chosen = sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)}) if count > ROWS else range(count)
        columns = self.texts
        return [(f"{self.points[i]:g}", [column[i] for column in columns]) for i in chosen]

    @property
    def summary(self) -> str:
        """The chart in words."""
        parts = [
            f"{s.name} {self._text(s, 0)} at step {s.x[0]:g}, {self._text(s, len(s.x) - 1)} at step {s.x[-1]:g}"
            for s in [s for s in self.series if s.kind in ("line", "dots")][:6]
            if s.x
        ]
        what = f"{self.title}, {self.measured} by {self.along}"
        return f"{what}: {'; '.join(parts)}. Arrow keys read single steps." if parts else what

    def _text(self, s: Series, i: int) -> str:
        if s.kind == "area":
            return self._value(s.y[i] - s.low[i])
        return f"{self._value(s.low[i])} to {self._value(s.y[i])}" if s.low else self._value(s.y[i])

    def _value(self, value: float) -> str:
        if not self.percent:
            return figure(value)
        return f"{100 * value:.2g}%" if 0 < abs(value) < 0.01 else f"{value:.1%}"

    def _tick(self, value: float) -> str:
        value = 0.0 if abs(value) < 1e-12 else value
        return f"{100 * value:g}%" if self.percent else f"{value:.6g}"

    def _x(self, value: float) -> float:
        low, high = self.span
        return 1000 * (value - low) / (high - low)

    def _y(self, value: float) -> float:
        low, high = self.levels
        return 1000 * (high - value) / (high - low)

    def _point(self, x: float, y: float) -> str:
        return f"{_n(self._x(x))} {_n(self._y(y))}"

    def _draw(self, s: Series) -> str:
        if s.kind == "silent" or not s.x:
            return ""
        points = [self._point(x, y) for x, y in zip(s.x, s.y, strict=True)]
        mark = f'class="{s.kind} c{s.colour % COLOURS}" data-owner="{escape(s.owner)}"'
        if s.kind == "whiskers":
            ends = [self._point(x, low) for x, low in zip(s.x, s.low, strict=True)]
            return f'<path {mark} d="{"".join(f"M{a}L{b}" for a, b in zip(points, ends, strict=True))}"/>'
        if s.low:
            back = [self._point(x, y) for x, y in zip(reversed(s.x), reversed(s.low), strict=True)]
            return f'<path {mark} d="M{"L".join(points + back)}Z"/>'
        joined = len(points) > 1 and s.kind != "points"
        path = f'<path {mark} d="M{"L".join(points)}"/>' if joined else ""
        if s.kind == "dots" or not joined:  # a line of no length with round ends is a dot at any stretch
            mark = mark.replace('class="', 'class="dot ')
            path += f'<path {mark} d="{"".join(f"M{p}h0" for p in points)}"/>'
        return path

    def _heat(self) -> str:
        shades: dict[int, list[str]] = {}
        for c in self.cells:
            x = self._x(c.left)
            y = self._y(c.top)
            width = self._x(c.right) - x
            height = self._y(c.bottom) - y
            box = f"M{_n(x)} {_n(y)}h{_n(width)}v{_n(height)}h{_n(-width)}z"
            shades.setdefault(max(1, math.ceil(c.strength * SHADES)), []).append(box)
        return "".join(f'<path class="heat h{shade}" d="{"".join(boxes)}"/>' for shade, boxes in sorted(shades.items()))


@dataclass(frozen=True)
class Plot(Chart):
    """A chart over something other than the steps, such as a setting's values."""

    labels: Mapping[float, str] = field(default_factory=dict)  # of places, instead of round values
    log: bool = False  # along it by the logarithm; all values are above 0 then

    @cached_property
    def span(self) -> tuple[float, float]:
        """First and last value shown, with some room; as logarithms if it is by these."""
        places = [self._scaled(x) for s in self.series for x in s.x] + [self._scaled(x) for x in self.labels]
        low = min(places)
        high = max(places)
        room = 0.06 * (high - low) or 0.5
        return low - room, high + room

    @property
    def x_ticks(self) -> list[Tick]:
        """Labels along it."""
        labels = self.labels or {x: f"{x:.6g}" for x in self._round()}
        return [Tick(round(self._x(x) / 10, 2), text) for x, text in labels.items()]

    def _round(self) -> list[float]:
        """Round values to label: powers of ten, if they are few their triples too, as far as that gives two."""
        low, high = self.span
        if self.log:
            factors = (1, 3) if high - low < 3 else (1,)
            powers = range(math.floor(low), math.ceil(high) + 1)
            found = [m * 10.0**power for power in powers for m in factors if low <= math.log10(m) + power <= high]
            if len(found) > 1:
                return found
            return _nice(10**low, 10**high, 4)
        return _nice(low, high, 4)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _x(self, value: float) -> float:
        return super()._x(self._scaled(value))


def figure(value: float) -> str:
    """A figure with four digits and separated thousands."""
    if value and abs(value) < 1e-4:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def to_json(value: Any) -> str:
    """JSON for a script element, without characters that HTML could take for its end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _nice(low: float, high: float, count: int) -> list[float]:
    """Round values between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

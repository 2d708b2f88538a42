"""Charts as a picture: one SVG file with all its text, for what has no page around it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from estune.charts.chart import COLOURS, STYLE, Plot, Series
from estune.errors import EstuneError
from estune.files import replacing

# Pixels of a chart with its labels, and of these the margins around its drawing.
WIDTH = 360
HEIGHT = 290
LEFT = 74
RIGHT = 14
TOP = 34
BOTTOM = 44
TURNED = 46  # pixels more at the bottom, where labels are slanted
LEGEND = 26  # pixels above all charts
LETTER = 6.3  # pixels that a letter is wide, about
LONGEST = 14  # letters of a label
FONT = "font: 11px system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def draw(charts: Sequence[Plot], path: Path) -> None:
    """Draw charts side by side, under one legend.

    Args:
        charts: one at least.
        path: an SVG file; an existing one is replaced.

    Raises:
        EstuneError: the file's name says that it is something else.
    """
    if path.suffix.lower() != ".svg":
        raise EstuneError(f"{path}: pictures are drawn as SVG; give a name that ends in .svg")
    with replacing(path) as temporary:
        temporary.write_text(_picture(charts), encoding="utf-8")


def _picture(charts: Sequence[Plot]) -> str:
    legend = next((chart.legend for chart in charts if chart.legend), [])
    top = LEGEND if legend else 0
    turned = TURNED if any(_is_crowded(chart) for chart in charts) else 0
    width = WIDTH * len(charts)
    height = top + HEIGHT + turned
    name = "; ".join(f"{chart.measured} by {chart.along}" for chart in charts)
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" ',
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">',
            f"<style>{STYLE.read_text(encoding='utf-8')}text {{ {FONT}; fill: var(--soft); }}\n",
            "text.title { fill: var(--ink); font-weight: 600; }\nrect.key { fill: var(--own); }</style>",
            f'<rect width="{width}" height="{height}" fill="var(--card)"/>',
            _legend(legend),
            *(_panel(chart, i * WIDTH, top) for i, chart in enumerate(charts)),
            "</svg>\n",
        ]
    )


def _legend(series: Sequence[Series]) -> str:
    parts = []
    x = float(LEFT)
    for s in series:
        parts.append(f'<rect class="key c{s.colour % COLOURS}" x="{x:.0f}" y="12" width="10" height="10" rx="3"/>')
        parts.append(_text(x + 15, 21, s.name))
        x += 30 + LETTER * len(s.name)
    return "".join(parts)


def _panel(chart: Plot, left: float, top: float) -> str:
    """A chart's drawing, stretched to its place, and the text around it."""
    x = left + LEFT
    y = top + TOP
    width = WIDTH - LEFT - RIGHT
    height = HEIGHT - TOP - BOTTOM
    turned = _is_crowded(chart)
    parts = [
        _text(left + 10, top + 20, chart.title, 'class="title"'),
        f'<svg x="{x:g}" y="{y:g}" width="{width}" height="{height}" viewBox="0 0 1000 1000" ',
        f'preserveAspectRatio="none" overflow="visible">{chart.svg}</svg>',
    ]
    for tick in chart.y_ticks:
        parts.append(_text(x - 8, y + height * (1 - tick.at / 100) + 4, tick.text, 'text-anchor="end"'))
    for tick in chart.x_ticks:
        at = x + width * tick.at / 100
        below = y + height + 17
        how = f'text-anchor="end" transform="rotate(-35 {at:.1f} {below:.1f})"' if turned else 'text-anchor="middle"'
        parts.append(_text(at, below, _shortened(tick.text), how))
    below = y + height + 36 + (TURNED if turned else 0)
    parts.append(_text(x + width / 2, below, chart.along, 'text-anchor="middle"'))
    beside = left + 16
    middle = y + height / 2
    how = f'text-anchor="middle" transform="rotate(-90 {beside:.1f} {middle:.1f})"'
    parts.append(_text(beside, middle, chart.measured, how))
    return "".join(parts)


def _is_crowded(chart: Plot) -> bool:
    """Whether the labels along a chart would run into one another if they were not slanted."""
    ticks = chart.x_ticks
    longest = max((len(_shortened(tick.text)) for tick in ticks), default=0)
    return LETTER * (longest + 1) * len(ticks) > WIDTH - LEFT - RIGHT


def _shortened(label: str) -> str:
    """A label, or only the end of a long one, where paths differ."""
    return label if len(label) <= LONGEST else f"…{label[1 - LONGEST :]}"


def _text(x: float, y: float, text: str, how: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {how}>{escape(text)}</text>'

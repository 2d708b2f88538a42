"""How measurements are drawn: one style, and one function a kind of picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

OURS, THEIRS, GREY = "#2f6db3", "#b9bec6", "#555555"
PALE = "#8db4de"  # ours in the second type, or the lesser part of a bar
PARTS = (OURS, PALE, "#c4562b", "#e0a34a", "#7a9a4e", "#8d6bb0", "#4fa3a5", "#b56580", "#b9bec6")

mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "svg.hashsalt": "estune"})


def tidy(axes: Axes, along: Literal["both", "x", "y"] = "y") -> None:
    """Two spines, a faint grid along the values, and grey labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=GREY, length=3)
    axes.grid(axis=along, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def panels(count: int, columns: int, height: float, width: float = 9) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, those left over taken away."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(width, rows * height), layout="constrained", squeeze=False)
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def bars(axes: Axes, values: Mapping[str, float], title: str, unit: str) -> None:
    """Horizontal bars, ours in colour, each with its value."""
    names = list(values)
    colors = [(PALE if "bfloat16" in name else OURS) if name.startswith("estune") else THEIRS for name in names]
    drawn = axes.barh(names, list(values.values()), color=colors, height=0.7)
    axes.bar_label(drawn, labels=[short(v) for v in values.values()], padding=3, color=GREY)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(values.values()))
    axes.set_title(title)
    axes.set_xlabel(unit, color=GREY)
    tidy(axes, "x")
    axes.tick_params(axis="y", length=0)


def groups(axes: Axes, table: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Groups of vertical bars: {group: {bar: value}}, every group of the same bars."""
    names = list(next(iter(table.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        color = OURS if name == "estune" else PARTS[-1] if len(names) == 2 else PARTS[i]
        x = np.arange(len(table)) + (i - (len(names) - 1) / 2) * width
        drawn = axes.bar(x, [row[name] for row in table.values()], width * 0.92, label=name, color=color)
        axes.bar_label(drawn, labels=[short(row[name]) for row in table.values()], padding=2, fontsize=8, color=GREY)
    axes.set_xticks(range(len(table)), [name.replace(", ", "\n") for name in table])
    axes.set_ylabel(unit, color=GREY)
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    tidy(axes)


def stacked(axes: Axes, table: Mapping[str, Mapping[str, float]], whole: str, notes: Sequence[str] = ()) -> None:
    """Horizontal bars of percents: {bar: {part: percent}}; parts below zero count as nothing. Notes stand behind."""
    left = np.zeros(len(table))
    for i, part in enumerate(next(iter(table.values()))):
        width = np.array([max(0.0, row[part]) for row in table.values()])
        axes.barh(list(table), width, left=left, color=PARTS[i % len(PARTS)], height=0.6, label=part)
        left += width
    for y, note in enumerate(notes):
        axes.text(left[y], y, f"  {note}", va="center", color=GREY)
    axes.invert_yaxis()
    axes.set_xlim(0, max(100.0, left.max()) * (1.12 if notes else 1.0))
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"percent of {whole}", color=GREY)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=3, fontsize=9)
    tidy(axes, "x")
    axes.tick_params(axis="y", length=0)


def line(axes: Axes, x: Sequence[float], y: Sequence[float], fit: Mapping[str, Any], labels: tuple[str, str]) -> None:
    """Points, and the line through them."""
    axes.scatter(x, y, color=OURS, zorder=3)
    if fit.get("r2") is None:  # too few points to judge a line
        axes.plot(x, y, color=PALE, linewidth=1.5)
        axes.set_title(labels[0])
    else:
        ends = np.array([0, max(x)])
        axes.plot(ends, fit["intercept"] + fit["slope"] * ends, color=PALE, linewidth=1.5)
        axes.set_title(f"{labels[0]} (R² {fit['r2']:.4f})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(0, 1.06 * max(x))
    axes.set_ylim(0, 1.08 * max(y))
    axes.set_xlabel(labels[0], color=GREY)
    axes.set_ylabel(labels[1], color=GREY)
    tidy(axes, "both")


def short(value: float) -> str:
    """A figure in three digits or so."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"

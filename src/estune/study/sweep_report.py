"""What a sweep came to: a table by settings, and the effect of each of them as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from estune.errors import EstuneError
from estune.study.sweep import METRICS, Trial, Values, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED = 8
"""So many numbers are told apart on an axis, each with its label; more are a search's, each with a run of its own."""


def groups(trials: Sequence[Trial], metric: str = METRICS[0]) -> list[tuple[Values, list[float]]]:
    """The metric of the trials that differ by nothing but their seed, under the settings that they share; best first.

    Trials that failed are left out.
    """
    found: dict[str, tuple[Values, list[float]]] = {}
    for trial in trials:
        values = {key: value for key, value in trial.values.items() if key != "seed"}
        if metric in trial.metrics:
            found.setdefault(name_of(values), (values, []))[1].append(trial.metrics[metric])
    return sorted(found.values(), key=lambda group: -statistics.fmean(group[1]))


def rows(trials: Sequence[Trial], metric: str = METRICS[0]) -> list[list[str]]:
    """A table: a heading, then a row for each setting, best first, with mean and deviation over seeds."""
    names = list(dict.fromkeys(key for trial in trials for key in trial.values if key != "seed"))
    head = [*names, metric, "deviation", "least", "most", "runs"]
    body = [
        [
            *(values.get(name, "") for name in names),
            f"{statistics.fmean(found):.4f}",
            f"{statistics.stdev(found):.4f}" if len(found) > 1 else "",
            f"{min(found):.4f}",
            f"{max(found):.4f}",
            str(len(found)),
        ]
        for values, found in groups(trials, metric)
    ]
    return [head, *body]


def effects(trials: Sequence[Trial], metric: str = METRICS[0]) -> dict[str, dict[str, list[float]]]:
    """For each swept setting that has several values, the metric of all trials at each of its values."""
    found: dict[str, dict[str, list[float]]] = {}
    for trial in trials:
        for key, value in trial.values.items():
            if metric in trial.metrics:
                found.setdefault(key, {}).setdefault(value, []).append(trial.metrics[metric])
    return {key: by for key, by in found.items() if len(by) > 1}


def draw_effects(trials: Sequence[Trial], path: Path, metric: str = METRICS[0]) -> None:
    """Draw the effect of each swept setting: a point a trial. The ending names the format.

    Where a setting has few values, each is labelled, and a line goes through the means.

    Raises:
        EstuneError: matplotlib is not installed, or nothing varies.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EstuneError("a picture needs matplotlib; install it with `pip install matplotlib`") from error
    found = effects(trials, metric)
    if not found:
        raise EstuneError("no setting of the sweep has two values with finished runs: there is no effect to draw")
    figure = Figure(figsize=(3.4 * len(found), 3), layout="constrained")
    for axes, (name, by) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        _draw_effect(axes, by)
        axes.set_xlabel(name)
        axes.set_ylabel(metric)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_effect(axes: Axes, by: dict[str, list[float]]) -> None:
    from matplotlib.ticker import LogLocator

    try:
        places, numbers = [float(value) for value in by], True
    except ValueError:
        places, numbers = [float(i) for i in range(len(by))], False  # names stand side by side
    for place, values in zip(places, by.values(), strict=True):
        axes.scatter([place] * len(values), values, color="#8db4de", s=18)
    many = numbers and len(by) > LABELLED
    if numbers and min(places) > 0 and max(places) / min(places) >= (10 if many else 4):
        axes.set_xscale("log")
    if many:
        if axes.get_xscale() == "log" and max(places) / min(places) < 1000:  # too few powers of ten to go by
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        return
    means = sorted(zip(places, map(statistics.fmean, by.values()), strict=True))
    axes.plot(*zip(*means, strict=True), color="#2f6db3", marker="o")
    axes.set_xticks(places, list(by), minor=False)
    axes.set_xticks([], minor=True)

"""The results of a sweep: a table by settings, and a picture of the effect of each setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from estune.charts.chart import Plot, Series
from estune.charts.picture import draw
from estune.errors import EstuneError
from estune.journal.shares import shown
from estune.study.sweep import METRICS, Trial, Values, name_of

LABELLED = 8
"""Numbers on an axis up to which each has a label; more are those of a search, with one run each."""


def groups(trials: Sequence[Trial], metric: str = METRICS[0]) -> list[tuple[Values, list[float]]]:
    """The metric of the trials that differ only in their seed, by the settings that they share; best first.

    Trials that failed are left out. A trial that a search drew twice counts once, as the same bits are no replication.
    """
    found: dict[str, tuple[Values, list[float]]] = {}
    for trial in _distinct(trials):
        values = {key: value for key, value in trial.values.items() if key != "seed"}
        if metric in trial.metrics:
            found.setdefault(name_of(values), (values, []))[1].append(trial.metrics[metric])
    return sorted(found.values(), key=lambda group: -statistics.fmean(group[1]))


def rows(trials: Sequence[Trial], metric: str = METRICS[0]) -> list[list[str]]:
    """Rows of a table: a heading, then one for each setting, best first, with mean and deviation over seeds.

    A metric that is a share in all trials is in percent.
    """
    share = _is_share(trials, metric)

    def cell(value: float) -> str:
        return shown(value, share) if share else f"{value:.4f}"

    names = list(dict.fromkeys(key for trial in trials for key in trial.values if key != "seed"))
    head = [*names, metric, "deviation", "least", "most", "runs"]
    body = [
        [
            *(values.get(name, "") for name in names),
            cell(statistics.fmean(found)),
            cell(statistics.stdev(found)) if len(found) > 1 else "",
            cell(min(found)),
            cell(max(found)),
            str(len(found)),
        ]
        for values, found in groups(trials, metric)
    ]
    return [head, *body]


def effects(trials: Sequence[Trial], metric: str = METRICS[0]) -> dict[str, dict[str, list[float]]]:
    """For each swept setting that has several values, the metric of all trials at each of its values."""
    found: dict[str, dict[str, list[float]]] = {}
    for trial in _distinct(trials):
        for key, value in trial.values.items():
            if metric in trial.metrics:
                found.setdefault(key, {}).setdefault(value, []).append(trial.metrics[metric])
    return {key: by for key, by in found.items() if len(by) > 1}


def draw_effects(trials: Sequence[Trial], path: Path, metric: str = METRICS[0]) -> None:
    """Draw the effect of each swept setting as SVG, with a point for each trial.

    If a setting has few values, each is labelled, and a line goes through the means.

    Raises:
        EstuneError: nothing varies, or the file's name is no SVG's.
    """
    found = effects(trials, metric)
    if not found:
        raise EstuneError("no setting of the sweep has two values with finished runs: there is no effect to draw")
    share = _is_share(trials, metric)
    draw([effect_chart(name, by, metric, percent=share) for name, by in found.items()], path)


def effect_chart(setting: str, by: Mapping[str, Sequence[float]], metric: str, *, percent: bool = False) -> Plot:
    """The metric of all trials at each value of a setting."""
    numbers = _numbers(by)
    places = numbers or [float(i) for i in range(len(by))]  # names stand side by side
    points = [(place, value) for place, values in zip(places, by.values(), strict=True) for value in values]
    series = [Series("a run", [x for x, _ in points], [y for _, y in points], "points")]
    many = numbers is not None and len(by) > LABELLED
    if not many:
        means = sorted(zip(places, map(statistics.fmean, by.values()), strict=True))
        series.append(Series("mean", [x for x, _ in means], [y for _, y in means], "dots"))
    wide = numbers is not None and min(places) > 0 and max(places) / min(places) >= (10 if many else 4)
    labels = {} if many else dict(zip(places, by, strict=True))
    measured = f"{metric}, %" if percent else metric
    return Plot(setting, metric, series, measured, setting, percent=percent, buttons=False, labels=labels, log=wide)


def _is_share(trials: Sequence[Trial], metric: str) -> bool:
    return all(metric in trial.shares for trial in trials if metric in trial.metrics)


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    return list({name_of(trial.values): trial for trial in trials if trial.error is None}.values())


def _numbers(values: Iterable[str]) -> list[float] | None:
    """The values as numbers; None if one of them is none."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None

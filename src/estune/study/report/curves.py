"""What is drawn along the steps: of one run, and of several over one another.

Steps are counted as metrics count them: training reward at step k is that of the k-th step's members, an evaluation at
step k is of the weights after k steps. Long runs are thinned: neighbouring steps share a point.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from estune.charts.chart import COLOURS, Cell, Chart, Series
from estune.es.strategy import mean_and_std
from estune.journal.journal import StepRecord
from estune.journal.shares import is_share
from estune.study.report.runs import Group, Run

POINTS = 200  # of a curve at most
BINS = 24  # of the distribution's rewards
TITLES = {
    "completions/mean_length": "Mean length, tokens",
    "completions/clipped_ratio": "Cut off at the longest length",
    "completions/distinct": "Distinct completions",
    "kl": "KL divergence to the base model",
    "weights/change": "Norm of the change of all weights",
    "weights/relative_change": "Change of all weights, of the base model's norm",
    "tokens_per_second": "Tokens a second, of whole steps",
    "failed_members": "Members without a reward",
    "learning_rate": "Learning rate",
}
"""Titles of metrics, with or without `eval_` before them; others appear under their own names after these."""
DRAWN_ELSEWHERE = {"step", "reward", "reward_std", "reward_min", "reward_max", "accuracy", "step_time", "num_tokens"}
PARTS = ("perturb", "generate", "grade", "update")
RATIOS = ("pass@", "mean@", "completions/clipped_ratio", "completions/distinct", "weights/relative_change")
MOST_METRICS = 24

Bucket = list[StepRecord]
Point = tuple[float, float]


def buckets(run: Run, limit: int = POINTS, longest: int | None = None) -> list[Bucket]:
    """The run's steps, several to a point if need be: the longest run has `limit` points at most."""
    size = max(1, math.ceil((longest or run.done) / limit))
    steps = run.journal.steps
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def learning(run: Run) -> list[Chart]:
    """Reward with its spread over the population, and accuracy."""
    owner = f"r{run.index}-"
    kept = [b for b in buckets(run) if any(_rewards(b))]
    charts = []
    series = []
    if kept:
        x = [b[-1].step + 1.0 for b in kept]
        each = [[mean_and_std(r) for r in _rewards(b) if r] for b in kept]
        mean = [statistics.fmean(m for m, _ in pairs) for pairs in each]
        std = [statistics.fmean(s for _, s in pairs) for pairs in each]
        pooled = [[v for r in _rewards(b) for v in r] for b in kept]
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        series += [
            Series("worst to best member", x, [max(p) for p in pooled], "wide", [min(p) for p in pooled], f"{owner}w"),
            Series("± standard deviation", x, high, "band", low, f"{owner}s"),
            Series("mean of the population", x, mean, owner=f"{owner}m"),
            Series("standard deviation", x, std, "silent", owner=f"{owner}s"),
        ]
    series += _evaluated(run, "eval_reward", "held out, unperturbed", f"{owner}e", 1)
    if series:
        charts.append(Chart(f"reward-{run.index}", "Reward", series, _shared(kept)))
    accuracy = _evaluated(run, "eval_accuracy", "held-out accuracy", f"{owner}a", 1)
    if accuracy:
        note = "The weights themselves, unperturbed."
        percent = _percent([run], "accuracy")
        charts.append(Chart(f"accuracy-{run.index}", "Held-out accuracy", accuracy, note, percent, from_zero=percent))
    return charts


def distribution(run: Run) -> Chart | None:
    """The rewards of all members of each step as a heat map with their median; None without any."""
    kept = [b for b in buckets(run, POINTS // 2) if any(_rewards(b))]
    if not kept:
        return None
    owner = f"r{run.index}-d"
    pooled = [sorted(v for r in _rewards(b) for v in r) for b in kept]
    low = min(p[0] for p in pooled)
    high = max(p[-1] for p in pooled)
    height = (high - low or 1.0) / BINS
    low -= 0.0 if high > low else 0.5
    cells = []
    for bucket, values in zip(kept, pooled, strict=True):
        counts = [0] * BINS
        for value in values:
            counts[min(BINS - 1, int((value - low) / height))] += 1
        for i, count in enumerate(counts):
            if count:
                bottom = low + i * height
                share = count / max(counts)
                cells.append(Cell(bucket[0].step + 0.5, bucket[-1].step + 1.5, bottom, bottom + height, share))
    x = [b[-1].step + 1.0 for b in kept]
    quantiles = {
        name: [_quantile(p, q) for p in pooled] for name, q in (("lowest", 0.0), ("25%", 0.25), ("median", 0.5))
    } | {name: [_quantile(p, q) for p in pooled] for name, q in (("75%", 0.75), ("highest", 1.0))}
    series = [
        Series(name, x, y, "thin" if name == "median" else "silent", owner=owner) for name, y in quantiles.items()
    ]
    note = f"A column a point of the curve, darkest where most members are; the line is their median. {_shared(kept)}"
    return Chart(f"distribution-{run.index}", "Rewards of all members", series, note.strip(), cells=cells)


def metrics(run: Run) -> list[Chart]:
    """Whatever else was recorded: in training as a line, in evaluation as dots."""
    charts = []
    for key in metric_keys([run])[:MOST_METRICS]:
        drawn = []
        owner = f"r{run.index}-{key}-"
        points = _points(buckets(run), key)
        if points:
            drawn.append(Series("training", [x for x, _ in points], [y for _, y in points], owner=f"{owner}t"))
        drawn += _evaluated(run, f"eval_{key}", "held out", f"{owner}e", 1)
        charts.append(Chart(f"{_id(key)}-{run.index}", _title(key), drawn, percent=_percent([run], key)))
    return charts


def metric_keys(runs: Sequence[Run]) -> list[str]:
    """Metrics worth a chart, known ones first: those that are not drawn elsewhere and do not stay the same.

    Only the first `MOST_METRICS` are drawn.
    """
    values: dict[str, set[float]] = {}
    for run in runs:
        for entry in run.journal.chronicle():
            for key, value in entry.metrics.items():
                values.setdefault(key.removeprefix("eval_"), set()).add(value)
    rewards = [key for key in values if key.startswith("rewards/")]
    dull = {key for key, found in values.items() if found == {0.0} or (len(found) == 1 and key not in TITLES)}
    dull |= DRAWN_ELSEWHERE | {key for key in values if key.startswith("time/")}
    dull |= set(rewards) if len(rewards) == 1 else set()
    known = [key for key in TITLES if key in values.keys() - dull]
    return [*known, *sorted(values.keys() - dull - set(known))]


def left_out(runs: Sequence[Run]) -> list[str]:
    """Metrics worth a chart for which the page has no room."""
    return metric_keys(runs)[MOST_METRICS:]


def parts_of_time(run: Run) -> dict[str, list[float]]:
    """Seconds of each step that went into each part, and the rest; empty where they were not recorded.

    Perturbing and generating are recorded as sums over the replicas, which work at once: they are divided by their
    number. Grading may go on meanwhile, so that the parts can come to more than the step; the rest is then 0.
    """
    steps = [r.metrics for r in run.journal.steps]
    if not steps or any("step_time" not in m or any(f"time/{p}" not in m for p in PARTS) for m in steps):
        return {}
    at_once = run.settings.get("workers") or run.settings.get("replicas") or 1
    share = {"perturb": at_once, "generate": at_once}
    parts = {p: [m[f"time/{p}"] / share.get(p, 1) for m in steps] for p in PARTS}
    sums = [sum(column) for column in zip(*parts.values(), strict=True)]
    return parts | {"rest": [max(0.0, m["step_time"] - s) for m, s in zip(steps, sums, strict=True)]}


def time_chart(run: Run) -> Chart | None:
    """Seconds of each step by part, one on the other."""
    parts = parts_of_time(run)
    if not parts:
        return None
    kept = buckets(run)
    x = [b[-1].step + 1.0 for b in kept]
    base = [0.0] * len(kept)
    series = []
    for colour, (part, seconds) in enumerate(parts.items()):
        means = [statistics.fmean(seconds[b[0].step : b[-1].step + 1]) for b in kept]
        top = [low + m for low, m in zip(base, means, strict=True)]
        series.append(Series(part, x, top, "area", base, f"r{run.index}-time-{part}", colour))
        base = top
    return Chart(f"time-{run.index}", "Seconds a step", series, _shared(kept), from_zero=True)


def overlays(groups: Sequence[Group]) -> list[Chart]:
    """Reward, accuracy and all other metrics of several runs: each run, and each group's mean and deviation."""
    runs = [run for group in groups for run in group.runs]
    limit = max(40, min(POINTS, 1600 // len(runs)))
    longest = max(run.done for run in runs)
    kept = {run.index: buckets(run, limit, longest) for run in runs}
    charts = [
        _overlay(groups, "all-reward", "Training reward", lambda run: _points(kept[run.index], "reward")),
        _overlay(
            groups,
            "all-accuracy",
            "Held-out accuracy",
            lambda run: _eval(run, "eval_accuracy"),
            percent=_percent(runs, "accuracy"),
        ),
        _overlay(groups, "all-eval-reward", "Held-out reward", lambda run: _eval(run, "eval_reward")),
    ]
    for key in metric_keys(runs)[:MOST_METRICS]:
        # Held out, unless all are the same there: then the difference is in training.
        held_out = len({y for run in runs for _, y in _eval(run, f"eval_{key}")}) > 1

        def values(run: Run, key: str = key, held_out: bool = held_out) -> list[Point]:
            return _eval(run, f"eval_{key}") if held_out else _points(kept[run.index], key)

        charts.append(_overlay(groups, f"all-{_id(key)}", _title(key), values, percent=_percent(runs, key)))
    return [chart for chart in charts if chart is not None]


def _overlay(
    groups: Sequence[Group], name: str, title: str, values: Callable[[Run], list[Point]], *, percent: bool = False
) -> Chart | None:
    series = []
    for group in groups:
        curves = {run: points for run in group.runs if (points := values(run))}
        several = len(group.runs) > 1
        if several and len(curves) == len(group.runs):
            series += _group_curve(group, list(curves.values()))
        for run, points in curves.items():
            label = run.label if several else group.label
            x = [p[0] for p in points]
            y = [p[1] for p in points]
            kind = "thin" if several else "line"
            series.append(Series(label, x, y, kind, owner=f"run-{run.index}", colour=group.index % COLOURS))
    if not series:
        return None
    return Chart(name, title, series, percent=percent, buttons=False, from_zero=percent)


def _group_curve(group: Group, curves: list[list[Point]]) -> list[Series]:
    """Mean and deviation over the runs, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    x = [step for step in tables[0] if all(step in table for table in tables)]
    if not x:
        return []
    columns = [[table[step] for table in tables] for step in x]
    mean = [statistics.fmean(c) for c in columns]
    spread = [statistics.stdev(c) for c in columns]
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    owner = f"group-{group.index}"
    colour = group.index % COLOURS
    return [
        Series(f"{group.label}, ± deviation", x, high, "band", low, owner, colour),
        Series(f"{group.label}, mean", x, mean, owner=owner, colour=colour),
    ]


def _rewards(bucket: Bucket) -> list[list[float]]:
    """For each step its members' rewards, without failed ones."""
    return [[r for r in record.rewards if r is not None] for record in bucket]


def _points(kept: Sequence[Bucket], key: str) -> list[Point]:
    """A metric's mean over each bucket that has it."""
    found = [(b[-1].step + 1.0, [r.metrics[key] for r in b if key in r.metrics]) for b in kept]
    return [(x, statistics.fmean(values)) for x, values in found if values]


def _eval(run: Run, key: str) -> list[Point]:
    """A metric of the evaluations. Those of tasks that are watched have no `eval_` before their names."""
    names = (key, key.removeprefix("eval_"))
    found = [
        (float(e.step), next((e.metrics[n] for n in names if n in e.metrics), None)) for e in run.journal.evaluations
    ]
    return [(step, value) for step, value in found if value is not None]


def _evaluated(run: Run, key: str, name: str, owner: str, colour: int) -> list[Series]:
    points = _eval(run, key)
    every = max(1, math.ceil(len(points) / POINTS))
    points = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    return [Series(name, x, y, "dots", owner=owner, colour=colour)] if points else []


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    below = ordered[math.floor(at)]
    above = ordered[math.ceil(at)]
    return below + (above - below) * (at - math.floor(at))


def _shared(kept: Sequence[Bucket]) -> str:
    size = max((b[-1].step - a[-1].step for a, b in pairwise(kept)), default=1)
    return f"Each point is the mean of up to {size} steps." if size > 1 else ""


def _title(key: str) -> str:
    if key.startswith("rewards/"):
        return f"Reward function {key.removeprefix('rewards/').removesuffix('/mean')}"
    return TITLES.get(key, key)


def _percent(runs: Sequence[Run], key: str) -> bool:
    """Whether a metric is a share in all of the runs. Keys have no `eval_` before them."""
    name = re.sub("^watch/[^/]*/", "", key)
    if name.startswith("accuracy"):
        return all(is_share(run.journal, key if key.startswith("watch/") else f"eval_{key}") for run in runs)
    return name.startswith(RATIOS)


def _id(key: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in key)

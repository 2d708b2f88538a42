"""Charts along the steps: of one run, and of several runs over one another.

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
from estune.journal.records import StepRecord
from estune.journal.shares import is_share
from estune.run.card import MEASURED_SHARE
from estune.study.report.certainty import interval
from estune.study.report.runs import Group, Run

POINTS = 200  # of a curve at most
BINS = 24  # of the distribution's rewards
TITLES = {
    "completions/mean_length": ("Mean length", "tokens a completion"),
    "completions/clipped_ratio": ("Cut off at the longest length", "share of completions, %"),
    "completions/distinct": ("Distinct completions", "share of completions, %"),
    "kl": ("KL divergence to the base model", "nats a token"),
    "weights/change": ("Norm of the change of all weights", "Euclidean norm"),
    "weights/relative_change": ("Change of all weights", "share of the base model's norm, %"),
    "failed_members": ("Members without a reward", "members"),
    "learning_rate": ("Learning rate", "learning rate"),
}
"""Titles and units of metrics, with or without `eval_` before them. Others go by their own names, after these."""
SPEED = "tokens_per_second"
DRAWN_ELSEWHERE = {"step", "reward", "reward_std", "reward_min", "reward_max", "accuracy", "step_time", "num_tokens"}
"""Metrics with a chart or a tile of their own; so has `SPEED`."""
PARTS = ("perturb", "generate", "grade", "update")
RATIOS = ("pass@", "mean@", "completions/clipped_ratio", "completions/distinct", "weights/relative_change")
MOST_METRICS = 24

Bucket = list[StepRecord]
Point = tuple[float, float]


def buckets(run: Run, limit: int = POINTS, longest: int | None = None) -> list[Bucket]:
    """The run's steps, if need be several to a point, so that the longest run has `limit` points at most."""
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
        charts.append(Chart(f"reward-{run.index}", "Reward", series, "mean reward", note=_shared(kept)))
    accuracy = _evaluated(run, "eval_accuracy", "held-out accuracy", f"{owner}a", 1)
    if accuracy:
        sure = " Upright lines are 95% intervals over the prompts." if len(accuracy) > 1 else ""
        went_back = [f" From step {e.step} the run went back to {e.back}." for e in run.journal.evaluations if e.undone]
        percent = _percent([run], "accuracy")
        charts.append(
            Chart(
                f"accuracy-{run.index}",
                "Held-out accuracy",
                accuracy,
                _accuracy_axis(percent),
                note=f"The weights themselves, unperturbed.{sure}{''.join(went_back)}",
                percent=percent,
                from_zero=percent,
            )
        )
    return charts


def distribution(run: Run) -> Chart | None:
    """A heat map of the rewards of all members of each step, with their median; None without rewards."""
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
    title = "Rewards of all members"
    return Chart(f"distribution-{run.index}", title, series, "reward of a member", note=note.strip(), cells=cells)


def metrics(run: Run) -> list[Chart]:
    """Charts of all other metrics: lines for training, dots for evaluations."""
    charts = []
    for key in metric_keys([run])[:MOST_METRICS]:
        drawn = []
        owner = f"r{run.index}-{key}-"
        points = _points(buckets(run), key)
        if points:
            drawn.append(Series("training", [x for x, _ in points], [y for _, y in points], owner=f"{owner}t"))
        drawn += _evaluated(run, f"eval_{key}", "held out", f"{owner}e", 1)
        percent = _percent([run], key)
        charts.append(Chart(f"{_id(key)}-{run.index}", _title(key), drawn, _axis(key, percent), percent=percent))
    return charts


def metric_keys(runs: Sequence[Run]) -> list[str]:
    """Metrics worth a chart, known ones first: those that are not drawn elsewhere and change.

    Only the first `MOST_METRICS` are drawn.
    """
    values: dict[str, set[float]] = {}
    for run in runs:
        for entry in run.journal.chronicle():
            for key, value in entry.metrics.items():
                values.setdefault(key.removeprefix("eval_"), set()).add(value)
    rewards = [key for key in values if key.startswith("rewards/")]
    dull = {key for key, found in values.items() if found == {0.0} or (len(found) == 1 and key not in TITLES)}
    dull |= DRAWN_ELSEWHERE | {SPEED} | {key for key in values if key.startswith("time/")}
    dull |= set(rewards) if len(rewards) == 1 else set()
    known = [key for key in TITLES if key in values.keys() - dull]
    return [*known, *sorted(values.keys() - dull - set(known))]


def left_out(runs: Sequence[Run]) -> list[str]:
    """Metrics worth a chart for which the page has no room."""
    return metric_keys(runs)[MOST_METRICS:]


def parts_of_time(run: Run) -> dict[str, list[float]]:
    """Seconds of each part of each step, and the rest; empty if they were not recorded.

    Perturbing and generating are recorded as sums over the replicas, which work at once, and are divided by the number
    of replicas. As grading may go on meanwhile, parts can add up to more than the step; the rest is then 0.
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
    """A chart of the seconds of each step, its parts stacked."""
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
    title = "Time of a step by part"
    return Chart(f"time-{run.index}", title, series, "seconds a step", note=_shared(kept), from_zero=True)


def speeds(run: Run) -> list[Point]:
    """Tokens generated a second in each step, as recorded, or else from the step's tokens and time."""
    found = []
    before = 0.0
    for record in run.journal.steps:
        m = record.metrics
        tokens = m.get("num_tokens", 0.0) - before
        before += tokens
        if SPEED in m:
            found.append((record.step + 1.0, m[SPEED]))
        elif "num_tokens" in m and m.get("step_time", 0.0) > 0:
            found.append((record.step + 1.0, tokens / m["step_time"]))
    return found


def speed_chart(run: Run) -> Chart | None:
    """Tokens a second along the steps; None where they are not known."""
    known = dict(speeds(run))
    kept = [(b[-1].step + 1.0, [known[r.step + 1.0] for r in b if r.step + 1.0 in known]) for b in buckets(run)]
    points = [(x, statistics.fmean(values)) for x, values in kept if values]
    if not points:
        return None
    series = [Series("tokens a second", [x for x, _ in points], [y for _, y in points], owner=f"r{run.index}-speed")]
    note = f"Tokens generated in a step over its whole time. {_shared(buckets(run))}".strip()
    return Chart(f"speed-{run.index}", "Speed", series, "tokens a second", note=note, from_zero=True)


def overlays(groups: Sequence[Group]) -> list[Chart]:
    """Reward, accuracy and all other metrics of several runs: each run, and each group's mean and deviation."""
    runs = [run for group in groups for run in group.runs]
    limit = max(40, min(POINTS, 1600 // len(runs)))
    longest = max(run.done for run in runs)
    kept = {run.index: buckets(run, limit, longest) for run in runs}
    share = _percent(runs, "accuracy")
    charts = [
        _overlay(
            groups, "all-reward", "Training reward", lambda run: _points(kept[run.index], "reward"), "mean reward"
        ),
        _overlay(
            groups,
            "all-accuracy",
            "Held-out accuracy",
            lambda run: _eval(run, "eval_accuracy"),
            _accuracy_axis(share),
            percent=share,
        ),
        _overlay(groups, "all-eval-reward", "Held-out reward", lambda run: _eval(run, "eval_reward"), "mean reward"),
    ]
    for key in metric_keys(runs)[:MOST_METRICS]:
        # Held out, unless all are the same there: then the difference is in training.
        held_out = len({y for run in runs for _, y in _eval(run, f"eval_{key}")}) > 1

        def values(run: Run, key: str = key, held_out: bool = held_out) -> list[Point]:
            return _eval(run, f"eval_{key}") if held_out else _points(kept[run.index], key)

        percent = _percent(runs, key)
        charts.append(_overlay(groups, f"all-{_id(key)}", _title(key), values, _axis(key, percent), percent=percent))
    return [chart for chart in charts if chart is not None]


def _overlay(
    groups: Sequence[Group],
    name: str,
    title: str,
    values: Callable[[Run], list[Point]],
    measured: str,
    *,
    percent: bool = False,
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
    return Chart(name, title, series, measured, percent=percent, buttons=False, from_zero=percent)


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
    return [[r for r in record.of_members if r is not None] for record in bucket]


def _points(kept: Sequence[Bucket], key: str) -> list[Point]:
    """A metric's mean over each bucket that has it."""
    found = [(b[-1].step + 1.0, [r.metrics[key] for r in b if key in r.metrics]) for b in kept]
    return [(x, statistics.fmean(values)) for x, values in found if values]


def _eval(run: Run, key: str) -> list[Point]:
    """A metric of the evaluations. Names of watched tasks' metrics do not begin with `eval_`."""
    names = (key, key.removeprefix("eval_"))
    found = [
        (float(e.step), next((e.metrics[n] for n in names if n in e.metrics), None)) for e in run.journal.evaluations
    ]
    return [(step, value) for step, value in found if value is not None]


def _evaluated(run: Run, key: str, name: str, owner: str, colour: int) -> list[Series]:
    """A metric of the evaluations, with 95% intervals where completions are known."""
    points = _eval(run, key)
    every = max(1, math.ceil(len(points) / POINTS))
    points = [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]
    if not points:
        return []
    drawn = [Series(name, [x for x, _ in points], [y for _, y in points], "dots", owner=owner, colour=colour)]
    shown = {x for x, _ in points}
    found = {float(e.step): interval(run, e, key) for e in run.journal.evaluations if e.step in shown}
    known = [(x, ends) for x, ends in found.items() if ends is not None]
    if known:
        low = [ends[0] for _, ends in known]
        high = [ends[1] for _, ends in known]
        drawn.append(Series(f"95% interval, {name}", [x for x, _ in known], high, "whiskers", low, owner, colour))
    return drawn


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
    return TITLES[key][0] if key in TITLES else key


def _axis(key: str, percent: bool) -> str:
    """The unit of a metric."""
    if key in TITLES:
        return TITLES[key][1]
    if key.startswith("rewards/"):
        return "mean score"
    return f"{key}, %" if percent else key


def _accuracy_axis(percent: bool) -> str:
    return MEASURED_SHARE if percent else "mean score"


def _percent(runs: Sequence[Run], key: str) -> bool:
    """Whether a metric is a share in all runs. Its key has no `eval_` before it."""
    name = re.sub("^watch/[^/]*/", "", key)
    if name.startswith("accuracy"):
        return all(is_share(run.journal, key if key.startswith("watch/") else f"eval_{key}") for run in runs)
    return name.startswith(RATIOS)


def _id(key: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in key)

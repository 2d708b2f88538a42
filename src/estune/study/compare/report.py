"""A comparison's results as a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from estune.charts import picture
from estune.charts.chart import Plot, Series
from estune.charts.table import markdown, spread
from estune.config import Config
from estune.errors import EstuneError
from estune.files import write_text
from estune.study.compare.plan import Plan, at_an_end, best_tried

Result = Mapping[str, Any]
NAMES = {"es": "ES", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "dapo": "DAPO", "rloo": "RLOO"}
END = "*"  # marks a rate at an end of those tried
# Heading, key, factor, digits.
COLUMNS = (
    ("before", "base_accuracy", 1.0, 3),
    ("accuracy", "accuracy", 1.0, 3),
    ("reward", "reward", 1.0, 3),
    ("KL", "kl", 1.0, 3),
    ("length", "length", 1.0, 1),
    ("short, wrong %", "short_but_wrong", 100.0, 1),
    ("tokens", "tokens", 1.0, 0),
    ("seconds", "seconds", 1.0, 0),
    ("peak MB", "memory", 1e-6, 0),
)


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Compared runs of each method, in the order of `NAMES`.

    Trials and failures are left out, and runs at a rate that was the best only until more were tried.
    """
    best = {method: best_tried(method, results) for method in NAMES}
    done = [
        r
        for r in results
        if not r["job"]["trial"] and "error" not in r and best[r["job"]["method"]] in (None, r["job"]["rate"])
    ]
    return {m: runs for m in NAMES if (runs := [r for r in done if r["job"]["method"] == m])}


def columns(share: bool) -> list[tuple[str, str, float, int]]:
    """`COLUMNS`, with accuracies in percent if they are shares."""
    return [
        (f"{heading} %", key, 100.0, 1)
        if share and key in ("base_accuracy", "accuracy")
        else (heading, key, factor, digits)
        for heading, key, factor, digits in COLUMNS
    ]


def are_shares(results: Iterable[Result]) -> bool:
    """Whether accuracies are declared to be shares or, in older results, whether they lie in 0 to 1."""
    return all(r.get("share", 0 <= r["accuracy"] <= 1) for r in results if "accuracy" in r)


def table(results: Sequence[Result]) -> list[list[str]]:
    """A heading, then a row for each method: mean over seeds and standard deviation of the sample.

    A star marks a rate at an end of those tried.
    """
    shown = columns(are_shares(results))
    head = ["method", "rate", "seeds", *(heading for heading, *_ in shown)]
    rows = []
    for method, runs in by_method(results).items():
        rate = runs[0]["job"]["rate"]
        figures = [
            # A result of an older version may lack a figure.
            spread([factor * r[key] for r in runs if key in r], digits)
            for _, key, factor, digits in shown
        ]
        marked = "" if rate is None else f"{rate:g}{END * at_an_end(runs[0]['job'], results)}"
        rows.append([NAMES[method], marked, str(len(runs)), *figures])
    return [head, *rows]


def trials_table(results: Sequence[Result]) -> list[list[str]]:
    """A heading, then a row for each run that served to choose a learning rate, by method and rate."""
    rows = []
    share = are_shares(results)
    trials = [r for r in results if r["job"]["trial"]]
    for r in sorted(trials, key=lambda r: (list(NAMES).index(r["job"]["method"]), r["job"]["rate"])):
        figures = []
        if "error" not in r:
            accuracy = f"{100 * r['accuracy']:.1f}" if share else f"{r['accuracy']:.3f}"
            figures = [accuracy, f"{r['reward']:.3f}", f"{r['kl']:.3f}"]
        rows.append([NAMES[r["job"]["method"]], f"{r['job']['rate']:g}", *(figures or ["failed", "", ""])])
    return [["method", "rate", f"accuracy{' %' * share}", "reward", "KL"], *rows]


def over_budget(results: Sequence[Result], budget: int) -> str:
    """The share of the budget by which each method's runs exceeded it, as steps are finished: mean over seeds."""
    spent = {m: [r["tokens"] for r in runs if "tokens" in r] for m, runs in by_method(results).items()}
    shares = [f"{NAMES[m]} {statistics.fmean(each) / budget - 1:.1%}" for m, each in spent.items() if each]
    return f"over the budget, by the step that spent the last of it: {', '.join(shares)}"


def described(plan: Plan, config: Config) -> str:
    """What was compared, as a list: model, task, budget and the settings of each kind of method."""
    lines = [
        f"model {config.model}, task {config.task.name}, completions of at most {config.max_new_tokens} tokens",
        f"budget: {plan.budget:,} generated tokens a run; seeds {', '.join(map(str, plan.seeds))}",
    ]
    if "es" in plan.methods:
        lines.append(
            f"ES: population {config.population}, {config.prompts_per_step} prompts a step, sigma {config.sigma:g}, "
            f"learning rate {config.learning_rate}, temperature {config.temperature:g}, weights {config.weights}"
        )
    if plan.methods != ["es"]:
        rates = ", ".join(f"{rate:g}" for rate in plan.rates)
        lines.append(
            f"RL: {plan.batch} completions a step in groups of {plan.generations}, temperature "
            f"{plan.rl_temperature:g}, weight of the KL penalty {plan.beta:g}, learning rates {rates}"
        )
    if "rloo" in plan.methods:
        lines.append("RLOO stands in for PPO, with which the paper compares: TRL has no PPO trainer any more")
    task = config.task.model_dump(mode="json", exclude_none=True, exclude={"name"})
    lines.append("task options: " + ", ".join(f"{key} {value}" for key, value in task.items()))
    return "\n".join(f"- {line}" for line in lines)


def write_report(folder: Path, results: Sequence[Result], plan: Plan, config: Config) -> Path:
    """Write `report.md`, and `report.svg` beside it if there is anything to draw; return the path of `report.md`."""
    parts = ["# Comparison", described(plan, config), markdown(table(results))]
    if any(r["job"]["trial"] for r in results):
        parts += [f"{END} at an end of the rates that were tried: others may be better."]
        parts += ["Learning rates that were tried:", markdown(trials_table(results))]
    failed = [f"- {r['job']}: {r['error']}" for r in results if "error" in r]
    if failed:
        parts += ["Runs that failed:", "\n".join(failed)]
    if by_method(results):
        parts.insert(3, over_budget(results, plan.budget))
        draw(results, folder / "report.svg")
        parts.insert(1, "![accuracy of each method](report.svg)")
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw accuracy, and accuracy against KL, as SVG: a point for each run, and a line at each method's mean.

    Raises:
        EstuneError: there is nothing to draw, or the file's name is no SVG's.
    """
    found = by_method(results)
    if not found:
        raise EstuneError("no run of the comparison has come to an end: there is nothing to draw")
    picture.draw(charts(found), path)


def charts(found: Mapping[str, Sequence[Result]]) -> list[Plot]:
    """Charts of each method's accuracy, and of accuracy against KL where that is finite."""
    accuracies: list[Series] = []
    divergences: list[Series] = []
    for place, (method, runs) in enumerate(found.items()):
        name = NAMES[method]
        colour = list(NAMES).index(method)
        accuracy = [r["accuracy"] for r in runs]
        mean = statistics.fmean(accuracy)
        accuracies.append(Series(name, [place] * len(runs), accuracy, "points", owner=method, colour=colour))
        accuracies.append(Series(name, [place - 0.3, place + 0.3], [mean, mean], owner=method, colour=colour))
        apart = [r for r in runs if math.isfinite(r["kl"])]
        kl = [r["kl"] for r in apart]
        divergences.append(Series(name, kl, [r["accuracy"] for r in apart], "points", owner=method, colour=colour))
    share = are_shares(r for runs in found.values() for r in runs)
    labels = {float(place): NAMES[method] for place, method in enumerate(found)}
    measured = "held-out accuracy, %" if share else "held-out accuracy"
    drawn = [
        Plot(
            "accuracy",
            "accuracy",
            accuracies,
            measured,
            "method",
            percent=share,
            buttons=False,
            from_zero=share,
            labels=labels,
        )
    ]
    every = [x for s in divergences for x in s.x]
    if every:
        along = "KL to the base, nats a token"
        wide = min(every) > 0
        drawn.append(Plot("kl", "accuracy", divergences, measured, along, percent=share, from_zero=share, log=wide))
    return drawn

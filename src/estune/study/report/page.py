"""The page: everything put together, in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from estune import __version__
from estune.charts.chart import COLOURS, STYLE, Chart, figure
from estune.charts.words import amount, duration
from estune.errors import EstuneError
from estune.files import write_text
from estune.journal.shares import is_share, shown, with_interval
from estune.run.recipe import own_task
from estune.study.report import curves, recipe
from estune.study.report.certainty import interval
from estune.study.report.completions import Kept, kept
from estune.study.report.layers import LayerTable, layer_table
from estune.study.report.runs import Group, Run, differences, group_runs, read_runs
from estune.study.report.samples import UNSEEN, Comparison, compare, readable
from estune.weights.locate import hub_name

HERE = Path(__file__).parent
T = TypeVar("T")
MOST_TEXT = 6_000_000  # characters of completions on a page, about


@dataclass(frozen=True)
class Skipped:
    """Something that could not be shown, and why."""

    reason: str


@dataclass(frozen=True)
class Section:
    """What the page says of one run."""

    run: Run
    tiles: list[tuple[str, str, str]]  # heading, value, remark
    learning: list[Chart]
    distribution: Chart | None
    metrics: list[Chart]
    left_out: list[str]  # metrics beyond those
    completions: Comparison | Skipped
    kept: Kept | Skipped
    layers: LayerTable | Skipped
    time: Chart | None
    speed: Chart | None
    parts: list[tuple[str, float, float]]  # name, seconds, share of all
    settings: list[recipe.Setting]
    file: str  # the settings as YAML
    commands: list[recipe.Command]
    own_task: bool

    @property
    def contents(self) -> dict[str, str]:
        """The section's parts: headings by the names that links lead to."""
        there = {
            "learning": "Learning" if self.learning or self.distribution else "",
            "said": "What it says, then and now",
            "followed": "One prompt through all evaluations"
            if isinstance(self.kept, Kept) and self.kept.prompts
            else "",
            "search": "All completions",
            "metrics": "Completions and weights along the way" if self.metrics else "",
            "layers": "Where the weights moved",
            "time": "Where the time went" if self.time or self.speed else "",
            "settings": "Settings",
            "again": "How to make it again",
        }
        return {name: heading for name, heading in there.items() if heading}


@dataclass(frozen=True)
class Row:
    """A line of the table of results: mean and deviation over a group, or a run of it."""

    owner: str
    colour: int
    label: str
    remark: str
    cells: list[str]
    whole: bool  # a group's


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write a page about these runs: one file, no network, no script needed to read it.

    Args:
        runs: directories of runs, finished or not. Runs with equal settings but for the seed are grouped.
        output: the HTML file; an existing one is replaced.

    Raises:
        EstuneError: there is no run, its journal cannot be read or is empty, or `output` is a directory. If anything
            else is missing (completions, checkpoints, the base model), a line on the page says so.
    """
    if output.is_dir():
        raise EstuneError(f"{output} is a directory: give the name of a file, such as {output / 'report.html'}")
    found = read_runs([Path(run) for run in runs])
    text = _render(found).lstrip().translate(UNSEEN)
    write_text(output, text)


def _render(runs: list[Run]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    style = STYLE.read_text(encoding="utf-8") + (HERE / "page.css").read_text(encoding="utf-8")
    script = "".join((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "completions.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "seconds": duration, "readable": readable, "percent": _percent}
    groups = group_runs(runs)
    return environment.get_template("page.html").render(
        title=_title(runs),
        version=__version__,
        style=style,
        script=script,
        # Even if something hostile got past the escaping, no script but ours would run.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=[_section(run, MOST_TEXT // len(runs)) for run in runs],
        groups=groups,
        overlays=curves.overlays(groups) if len(runs) > 1 else [],
        left_out=curves.left_out(runs),
        results=_results(groups),
        differing=differences([group.runs[0] for group in groups]),
        colours=COLOURS,
        skipped=lambda value: isinstance(value, Skipped),
    )


def _section(run: Run, room: int) -> Section:
    parts = {name: sum(seconds) for name, seconds in curves.parts_of_time(run).items()}
    whole = sum(parts.values()) or 1.0
    return Section(
        run=run,
        tiles=_tiles(run),
        learning=curves.learning(run),
        distribution=curves.distribution(run),
        metrics=curves.metrics(run),
        left_out=curves.left_out([run]),
        completions=_or_skipped(compare, run),
        kept=_or_skipped(lambda run: kept(run, room), run),
        layers=_or_skipped(layer_table, run),
        time=curves.time_chart(run),
        speed=curves.speed_chart(run),
        parts=[(name, seconds, seconds / whole) for name, seconds in parts.items()],
        settings=recipe.settings_table(run),
        file=recipe.settings_file(run),
        commands=recipe.commands(run),
        own_task=own_task(run.journal),
    )


def _or_skipped(make: Callable[[Run], T], run: Run) -> T | Skipped:
    try:
        return make(run)
    except EstuneError as error:
        return Skipped(str(error))


def _title(runs: Sequence[Run]) -> str:
    headers = [run.journal.header for run in runs]
    what = list(
        dict.fromkeys(f"{header.task or 'a task'} with {Path(hub_name(header.model)[0]).name}" for header in headers)
    )
    return what[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(what)}"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures to know first."""
    tiles = []
    first = run.first
    best = run.best
    last = run.last
    if first and best and last and "eval_accuracy" in first.metrics:
        share = is_share(run.journal, "eval_accuracy")
        before, after, end = (shown(e.metrics["eval_accuracy"], share) for e in (first, best, last))
        ends = interval(run, best, "eval_accuracy")
        sure = "" if ends is None else f", 95% interval {shown(ends[0], share)} to {shown(ends[1], share)}"
        remark = f"best, at step {best.step}{sure}; last {end}"
        tiles.append(("Held-out accuracy", after if best is first else f"{before} → {after}", remark))
    for key, name in (("eval_reward", "Held-out reward"), ("eval_completions/mean_length", "Mean length")):
        if first and best and key in first.metrics and key in best.metrics:
            change = f"{figure(first.metrics[key])} → {figure(best.metrics[key])}"
            tiles.append((name, change, "tokens, held out" if "length" in key else "first and best evaluation"))
    steps = [r.metrics for r in run.journal.steps]
    if steps:
        population = len(run.journal.steps[-1].of_members)
        prompts = len(run.journal.steps[-1].prompts) // run.journal.settings.get("prompt_groups", 1)
        tiles.append(("Steps", f"{run.done}", f"of {amount(population, 'members')} x {amount(prompts, 'prompts')}"))
        if all("step_time" in m for m in steps):
            tokens = f"{figure(steps[-1]['num_tokens'])} tokens" if "num_tokens" in steps[-1] else "all steps"
            tiles.append(("Time in steps", duration(sum(m["step_time"] for m in steps)), tokens))
        if speeds := [speed for _, speed in curves.speeds(run)]:
            tiles.append(("Speed", f"{figure(statistics.median(speeds))} tokens/s", "median of the steps"))
    return tiles


def _results(groups: Sequence[Group]) -> list[Row]:
    rows = []
    for group in groups:
        colour = group.index % COLOURS
        share = all(is_share(run.journal, "eval_accuracy") for run in group.runs)
        if len(group.runs) > 1:
            columns = list(zip(*map(_figures, group.runs), strict=True))
            cells = [_mean_and_deviation(list(column), share and i < 3) for i, column in enumerate(columns)]
            rows.append(
                Row(f"group-{group.index}", colour, group.label, f"mean of {len(group.runs)} runs", cells, True)
            )
        for run in group.runs:
            label = run.label if len(group.runs) > 1 or group.label == run.label else f"{group.label} ({run.label})"
            cells = [_cell(value, share and i < 3) for i, value in enumerate(_figures(run))]
            for i, evaluation in enumerate((run.first, run.best, run.last)):
                ends = interval(run, evaluation, "eval_accuracy") if evaluation else None
                if evaluation and ends:
                    cells[i] = with_interval(evaluation.metrics["eval_accuracy"], ends, share)
            remark = f"seed {run.settings.get('seed', '?')}; {run.state}"
            rows.append(Row(f"run-{run.index}", colour, label, remark, cells, len(group.runs) == 1))
    return rows


def _figures(run: Run) -> tuple[float | None, ...]:
    """First, best and last accuracy, best and last reward, time of all steps."""

    def metric(record: Any, key: str) -> float | None:
        return None if record is None else record.metrics.get(key)

    first = run.first
    last = run.last
    best = run.best
    times = [r.metrics["step_time"] for r in run.journal.steps if "step_time" in r.metrics]
    accuracies = tuple(metric(e, "eval_accuracy") for e in (first, best, last))
    return (*accuracies, metric(best, "eval_reward"), metric(last, "eval_reward"), sum(times) if times else None)


def _mean_and_deviation(values: list[float | None], percent: bool) -> str:
    """Mean over runs, and the standard deviation of a sample (n - 1)."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return _cell(known[0] if known else None, percent)
    mean = statistics.fmean(known)
    deviation = statistics.stdev(known)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}%" if percent else f"{figure(mean)} ± {figure(deviation)}"


def _cell(value: float | None, percent: bool) -> str:
    if value is None:
        return "-"
    return shown(value, percent) if percent else figure(value)


def _percent(value: float) -> str:
    return f"{value:.1%}"

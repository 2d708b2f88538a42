"""docs/study-tables.md and its pictures, from the results of `bench.study.compare` and `bench.study.sensitivity`.

    python -m bench.study.page

What came of it all is docs/study.md, written by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.common import RESULTS, read_lines
from bench.study import compare, kept, objectives, real, sensitivity
from bench.study import parts as parts_of_the_strategy

from estune.charts.table import markdown, spread
from estune.study.compare.report import NAMES, by_method, draw, table, trials_table

PAGE = Path(__file__).parents[2] / "docs" / "study-tables.md"
VERSIONS = ("python", "estune", "torch", "transformers")

Result = Mapping[str, Any]


def page(results: Path, path: Path) -> None:
    """Write the page and its pictures."""
    found = {name: _read(results / f"study-{name}.jsonl") for name in compare.EXPERIMENTS}
    sizes = json.loads(max(results.glob("sensitivity-*.json")).read_text())
    images = path.parent / "images" / "study"
    _picture({name: found[name] for name in compare.COUNTDOWN}, images / "accuracy.svg")
    draw(found[compare.CONCISENESS], images / "conciseness.svg")
    parts = [
        _introduction(found),
        "## Countdown",
        "![accuracy of each method on each model](images/study/accuracy.svg)",
        markdown(_overview(found)),
    ]
    for name in compare.COUNTDOWN:
        parts += [
            f"### {name}",
            markdown(table(found[name])),
            "Accuracy in percent, and KL, at the learning rates tried, on a seed of their own:",
            markdown(_by_rate(found[name])),
        ]
    parts += [
        "## Conciseness",
        "The embedded model, and the paper's reward: minus the difference in characters between an answer's length\n"
        "and the reference's. It does not ask whether the answer is right, so it can be hacked: by short answers\n"
        "that are wrong. Accuracy, which nobody is trained for here, is the share of answers with the right word.",
        "![correct answers, and against the divergence from the base](images/study/conciseness.svg)",
        markdown(table(found[compare.CONCISENESS])),
        *_careful(results),
        "Learning rates tried on a seed of their own:",
        markdown(trials_table(found[compare.CONCISENESS])),
        "## Sensitivity of ES",
        f"Accuracy in percent after training {compare.EMBEDDED} on Countdown, mean and deviation over "
        f"{len(sensitivity.SEEDS)} seeds which\nthe comparison does not use. {sizes['grid'][0]['steps']} steps of "
        f"{compare.POPULATION} members and {compare.PROMPTS} prompts; sigma down, alpha across:",
        markdown(sensitivity.grid_table(sizes["grid"])),
        "Populations at about equal numbers of tokens, so that fewer members make more steps:",
        markdown(sensitivity.population_table(sizes["populations"])),
        "The paper's reward for conciseness, "
        f"{max(r['steps'] for r in sizes['conciseness'])} steps at the alpha of the other runs:",
        markdown(sensitivity.conciseness_table(sizes["conciseness"])),
        *_alphas(results),
        parts_of_the_strategy.section(results),
        *objectives.section(results),
        *parts_of_the_strategy.again(results),
        *real.section(results),
        *kept.section(results),
        _origin(results),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")


def _careful(results: Path) -> list[str]:
    """Conciseness by other settings of ES, where they were measured."""
    path = results / f"parts-{compare.CONCISENESS}.jsonl"
    if not path.is_file():
        return []
    lines = read_lines(path)
    head, *_ = table(lines)
    rows = []
    for name in dict.fromkeys(line["settings"] for line in lines):
        _, row = table([line for line in lines if line["settings"] == name])
        rows.append([f"ES, `{name}`", *row[1:]])
    return [
        "ES with other settings of `bench.study.parts`, within the same budget:",
        markdown([head, *rows]),
    ]


def _alphas(results: Path) -> list[str]:
    """Alphas around those settings for which they were measured."""
    newest = {}
    for file in sorted(results.glob("alphas-*.json")):
        measured = json.loads(file.read_text())
        newest[measured["settings"]["alphas_of"]] = measured
    parts = []
    for measured in newest.values():
        told, runs = measured["settings"], measured["alphas"]
        of = f"`{told['alphas_of']}` of the table below, {runs[0]['steps']} steps, seeds {told['seeds']}"
        parts += [f"Alphas around the settings {of}:", markdown(sensitivity.alphas_table(runs))]
    return parts


def _read(path: Path) -> list[Result]:
    """Runs of the study's budget."""
    return [r for line in path.read_text().splitlines() if (r := json.loads(line))["budget"] == compare.BUDGET]


def _introduction(found: Mapping[str, Sequence[Result]]) -> str:
    budget = found[compare.EMBEDDED][0]["budget"]
    _, _, design = (compare.__doc__ or "").partition("One set of ")
    return (
        "# The study's tables\n\n<!-- By `python -m bench.study.page`. -->\n\n"
        f"One set of {design.strip()}\n\n"
        f"A run may generate {budget:,} tokens. In Countdown with three numbers each model has the skill and\n"
        "seldom uses it, by the [recipe](../recipes/tiny) of the embedded model, which for the others is cut short.\n"
        "Figures are means over seeds, with the standard deviation of the sample. [compare.md](compare.md) says what\n"
        "each column is, and [the study](study.md) what came of all this."
    )


def _by_rate(found: Sequence[Result]) -> list[list[str]]:
    """Accuracy and KL of the runs that chose a learning rate: a row a method, a column a rate."""
    cells = {
        (r["job"]["method"], r["job"]["rate"]): f"{100 * r['accuracy']:.1f} ({r['kl']:.3f})"
        for r in found
        if r["job"]["trial"] and "error" not in r
    }
    rates = sorted({rate for _, rate in cells})
    methods = [m for m in NAMES if any(m == method for method, _ in cells)]
    return [["", *(f"{rate:g}" for rate in rates)],
            *([NAMES[m], *(cells.get((m, rate), "") for rate in rates)] for m in methods)]  # fmt: skip


def _accuracies(found: Sequence[Result]) -> dict[str, list[float]]:
    """Percents of each method's runs, the base model first."""
    runs = by_method(found)
    every = [100 * r["base_accuracy"] for rs in runs.values() for r in rs]
    return {"before": every[:1], **{NAMES[m]: [100 * r["accuracy"] for r in rs] for m, rs in runs.items()}}


def _overview(found: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """Accuracy of each method on each model: the paper's first table."""
    rows = {name: _accuracies(found[name]) for name in compare.COUNTDOWN}
    head = ["accuracy %", *rows[compare.EMBEDDED]]
    return [head, *([name, *(spread(by.get(m, []), 1) for m in head[1:])] for name, by in rows.items())]


def _picture(found: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Bars of the methods that ran on all models."""
    means = {name: {m: statistics.fmean(v) for m, v in _accuracies(runs).items()} for name, runs in found.items()}
    shared = [m for m in means[compare.EMBEDDED] if all(m in by for by in means.values())]
    figure, (axes,) = plots.panels(1, 1, 3.4, 9)
    plots.groups(axes, {name: {m: by[m] for m in shared} for name, by in means.items()}, "accuracy %")
    plots.save(figure, path)


def _origin(results: Path) -> str:
    """Where the figures come from: of all lines of results the processors and versions."""
    machines = [
        m for file in sorted(results.rglob("*.jsonl")) for line in read_lines(file) if (m := line.get("machine"))
    ]
    kinds = {name: ", ".join(sorted({m[name] for m in machines})) for name in ("cpu", *VERSIONS)}
    versions = "; ".join(f"{name} {kinds[name]}" for name in VERSIONS)
    return (
        f"<sub>`python -m bench.study.compare run`, and the commands named above; {kinds['cpu']}, one thread a run, "
        f"two runs at a time and at times other work beside, so that seconds are rough; {versions}</sub>"
    )


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    page(arguments.results, arguments.output)


if __name__ == "__main__":
    main()

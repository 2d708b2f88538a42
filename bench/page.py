"""The page of all measurements: the newest result of each name as pictures and tables, with machine and command.

    python -m bench.page [--results bench/results] [-o docs/performance.md]

Nothing is measured here. Pictures are SVG and lie beside the page, in `images/performance/`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.common import RESULTS
from bench.plots import short

from estune.charts.table import markdown

Result = Mapping[str, Any]
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
DATED = re.compile(r"(.+)-\d{4}-\d\d-\d\d\.json")
SIZES = ("embedded", "1M", "3M", "10M", "25M", "100M")
INTRODUCTION = """# Performance

Made by `python -m bench.page` from the newest results in [bench/results](../bench/results). What each figure means
exactly, and what makes a comparison fair, is said at the top of the script that took it;
[bench/README.md](../bench/README.md) lists them all. Compare ratios rather than figures of different machines.
"""


def newest(results: Path) -> dict[str, Result]:
    """The newest result of each name, but for those that `bench.study.page` shows."""
    found: dict[str, Result] = {}
    for path in results.glob("*.json"):
        if (named := DATED.fullmatch(path.name)) and named[1] not in ("sensitivity", "alphas"):
            result = json.loads(path.read_text())
            if named[1] not in found or found[named[1]]["date"] < result["date"]:
                found[named[1]] = result
    return found


class Page:
    """Markdown in the making, and the folder where its pictures go."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, [INTRODUCTION]
        self.images = path.parent / "images" / "performance"

    def add(self, *paragraphs: str) -> None:
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def picture(self, figure: Any, name: str, description: str) -> None:
        plots.save(figure, self.images / f"{name}.svg")
        self.add(f"![{description}](images/performance/{name}.svg)")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        self.add(markdown([[_cell(value) for value in row] for row in (head, *rows)]))

    def origin(self, result: Result) -> None:
        """Command, date and machine."""
        m = result["machine"]
        instructions = f" ({', '.join(m['instructions'])})" if m.get("instructions") else ""
        device = f", {result['device']}" if isinstance(result.get("device"), str) else ""
        versions = ", ".join(f"{name} {m[name]}" for name in ("estune", "torch", "transformers") if name in m)
        self.add(
            f"<sub>`{result['command']}`, {result['date'][:10]}; {m['cpu']}, {m['cores']} cores{instructions}, "
            f"{m['memory_gib']} GiB{device}; Python {m['python']}, {versions}</sub>"
        )

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines).rstrip() + "\n")


def whole_step(page: Page, results: dict[str, Result]) -> None:
    page.add("## A whole step", "Perturb, generate for every member, update; grading is left out of all contestants.")
    cases = [(result, case) for result in results.values() for case in result["cases"]]
    figure, axes = plots.panels(len(cases), columns=1, height=1.9)
    for panel, (result, case) in zip(axes, cases, strict=True):
        found = result["cases"][case]
        plots.bars(panel, found["seconds a member"], f"{_model(result)}, {case}", "seconds a member")
    page.picture(figure, "step", "seconds a member of each contestant")
    for result in results.values():
        told = result["settings"]
        page.add(f"### {_model(result)}")
        page.add(f"{told['members']} members, {told['prompts']} prompts, up to {told['new_tokens']} tokens.")
        for case, found in result["cases"].items():
            _step_case(page, case, found, told["prompts"])
        page.origin(result)


def _step_case(page: Page, case: str, found: Result, prompts: int) -> None:
    compiled = "; ".join(f"{dtype}: {what}" for dtype, what in found["compiled"].items())
    agree = "; ".join(
        f"{dtype} {', '.join(f'{count} {weights}' for weights, count in counts.items())}"
        for dtype, counts in found["agree"].items()
    )
    rows = []
    for name, seconds in found["seconds a member"].items():
        ratios = [_times(found, dtype, name) for dtype in found["agree"]]
        rows.append([name, seconds, found["tokens per second"][name], found["mean completion length"][name], *ratios])
    ours = [f"estune {dtype}, times as fast" for dtype in found["agree"]]
    page.add(f"**{case[:1].upper()}{case[1:]}**")
    page.table(["contestant", "seconds a member", "tokens a second", "mean length", *ours], rows)
    modes = "; ".join(f"{name.partition(',')[0]}: {mode}" for name, mode in found["mode"].items())
    page.add(f"Fastest modes: {modes}. Completions that agree, of {prompts}, by weights: {agree}.")
    if compiled:
        page.add(f"Compiled static cache: {compiled}.")


def _times(found: Result, dtype: str, other: str) -> Any:
    ratio = found["times as fast"].get(f"estune, {dtype} against {other}")
    return "" if ratio is None else f"{ratio:.2f}"


def training(page: Page, results: dict[str, Result]) -> None:
    page.add(
        "## Training against plain inference",
        "Tokens a second of whole training steps, as a share of plain batched inference by the same engines on the "
        "same prompts, and where the rest of a step goes.",
    )
    (result,) = results.values()
    figure, (axes,) = plots.panels(1, 1, height=2.4)
    plots.stacked(axes, {"a step": result["percent by part"]}, "a step")
    page.picture(figure, "train_speed", "parts of a training step")
    page.table(["", "tokens a second"], result["tokens per second"].items())
    page.add(f"**Share of plain inference: {result['share of plain inference']:.1%}**, the median over the steps.")
    rows = [[part, result["seconds by part"][part], share] for part, share in result["percent by part"].items()]
    page.table(["part of a step", "seconds", "percent"], rows)
    page.origin(result)


def decoding(page: Page, results: dict[str, Result]) -> None:
    page.add("## Decoding", "Random models, no row ends early.")
    pairs = [(result, dtype) for result in results.values() for dtype in result["tokens per second"]]
    figure, axes = plots.panels(len(pairs), columns=2, height=2.6, width=12)
    for panel, (result, dtype) in zip(axes, pairs, strict=True):
        plots.bars(panel, result["tokens per second"][dtype], f"{result['size']}, {dtype}", "tokens a second")
    page.picture(figure, "decode", "tokens a second of each contestant")
    for result in results.values():
        rates = result["tokens per second"]
        page.add(f"**{result['size']}**, {result['settings']['rows']} prompts, {result['new tokens']} tokens")
        rows = [[name, *(found[name] for found in rates.values())] for name in next(iter(rates.values()))]
        page.table(["tokens a second", *rates], rows)
        page.origin(result)
    _peak(page, results)


def _peak(page: Page, results: dict[str, Result]) -> None:
    page.add(
        "### Against the machine's peak",
        "One engine, one thread; a token step adds one token to every row. The peak is `torch.mm` at the same shapes.",
    )
    key = "decoding against the peak, 1 thread"
    found = {f"{r['size']}, {dtype}": peak for r in results.values() for dtype, peak in r[key].items()}
    figure, (axes,) = plots.panels(1, 1, height=0.9 + 0.45 * len(found))
    percent = {
        name: {part: 100 * ms / sum(peak["ms a token step"].values()) for part, ms in peak["ms a token step"].items()}
        for name, peak in found.items()
    }
    notes = [f"{sum(peak['ms a token step'].values()):.3g} ms" for peak in found.values()]
    plots.stacked(axes, percent, "a token step", notes)
    page.picture(figure, "decode-peak", "a token step, by what its matrix products would take at the peak")
    rate = "gflop per second"
    columns: dict[str, Callable[[Result], Any]] = {
        "GFLOP/s": lambda peak: peak[rate],
        "torch.mm, these shapes": lambda peak: peak[f"{rate}, torch.mm at these shapes"],
        "torch.mm, large": lambda peak: peak[f"{rate}, torch.mm of large matrices"],
        "share of the peak": lambda peak: f"{peak['share of the peak']:.1%}",
        "ms at peak": lambda peak: peak["ms a token step"]["matrix products at peak"],
        "ms, the rest": lambda peak: peak["ms a token step"]["the rest"],
    }
    rows = [[name, *(value(peak) for value in columns.values())] for name, peak in found.items()]
    page.table(["", *columns], rows)


def noise(page: Page, results: dict[str, Result]) -> None:
    (result,) = results.values()
    page.add("## Noise", "Perturbing and updating, in million elements a second, one thread.")
    work = {
        name: rates for name, rates in result.items() if name.startswith(("perturb", "update")) and "estune" in rates
    }
    torch = {name: _torch(rates) for name, rates in work.items()}
    best = {name: max(rates.values()) for name, rates in torch.items()}
    chart = {
        name.removesuffix(" elements"): {"estune": rates["estune"], "torch, its best way": best[name]}
        for name, rates in work.items()
    }
    figure, (axes,) = plots.panels(1, 1, height=3.6, width=11)
    plots.groups(axes, chart, result["unit"])
    page.picture(figure, "noise", "estune's kernels against torch's generator")
    ways = list(dict.fromkeys(way for rates in torch.values() for way in rates))
    rows = [
        [name, rates["estune"], *(torch[name].get(way) for way in ways), f"{rates['estune'] / best[name]:.2f}"]
        for name, rates in work.items()
    ]
    page.table(["", "estune", *ways, "times torch's best"], rows)
    threads = result["perturb, float32, threads"]
    page.add(f"Two threads perturb {threads['two threads'] / threads['one thread']:.2f} times as fast as one.")
    page.origin(result)


def _torch(rates: Mapping[str, float]) -> dict[str, float]:
    return {way: rate for way, rate in rates.items() if way != "estune" and "/" not in way}


def scaling(page: Page, results: dict[str, Result]) -> None:
    (result,) = results.values()
    page.add("## Scaling", "What a step costs, against what is asked of it, with the line of least squares.")
    curves = {
        "population": ("members", "seconds a step"),
        "prompts": ("prompts", "seconds a step"),
        "parameters": ("parameters", "seconds a step"),
        "replicas": ("replicas", "members a second"),
        "threads": ("threads", "members a second"),
    }
    figure, axes = plots.panels(len(curves), columns=3, height=2.8, width=11)
    rows = []
    for panel, (name, (x, y)) in zip(axes, curves.items(), strict=True):
        found = result[name]
        plots.line(panel, found[x], found[y], found, (x, y))
        points = ", ".join(f"{_cell(a)}: {_cell(b)}" for a, b in zip(found[x], found[y], strict=True))
        rows.append([f"{y} by {x}", points, *(found.get(key) for key in ("slope", "intercept", "r2"))])
    page.picture(figure, "scaling", "cost of a step against population, prompts, parameters, replicas and threads")
    page.table(["", "points", "slope", "intercept", "R²"], rows)
    page.origin(result)


def other(page: Page, results: dict[str, Result]) -> None:
    """A result without a picture of its own: its figures, one a row."""
    for name, result in results.items():
        page.add(f"## {name.replace('_', ' ').capitalize()}")
        plain = {key: result[key] for key in result if key not in {"date", "command", "machine", "settings"}}
        page.table(["", "figure"], _leaves(plain))
        page.origin(result)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif not isinstance(value, list):
        yield ": ".join(path), value
    elif value and not any(isinstance(item, Mapping) for item in value):
        yield ": ".join(path), ", ".join(map(_cell, value))


def _model(result: Result) -> str:
    model = str(result["model"])
    kind = "embedded model" if model == "embedded" else f"random Qwen2, {model}" if model in SIZES else model
    return f"{kind} ({result['parameters'] / 1e6:.3g} M parameters)"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"-{short(-value)}" if value < 0 else short(value)


SECTIONS: tuple[tuple[str, Callable[[Page, dict[str, Result]], None]], ...] = (
    (r"step-.+", whole_step),
    (r"train_speed", training),
    (r"decode-.+", decoding),
    (r"noise", noise),
    (r"scaling", scaling),
    (r".+", other),
)


def build(results: Path, path: Path) -> None:
    """Write the page and its pictures."""
    left, page = newest(results), Page(path)
    for pattern, section in SECTIONS:
        names = sorted((name for name in left if re.fullmatch(pattern, name)), key=_by_size)
        if names:
            section(page, {name: left.pop(name) for name in names})
    page.write()


def _by_size(name: str) -> tuple[int, str]:
    size = name.rpartition("-")[2]
    return SIZES.index(size) if size in SIZES else len(SIZES), name


def main() -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    build(arguments.results, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()

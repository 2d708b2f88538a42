"""How the cost of a step grows with population, prompts and parameters, and falls with replicas and threads.

    python -m bench.speed.scaling [--repeats 3] [--sizes 1M 3M 10M 25M]

A step is estune's parts as its trainer uses them: perturb and generate for every member, then update; grading is left
out. Each figure is the median over repeats, in which all points of a curve take turns. A line of least squares goes
through each curve: the slope is what one more costs, the intercept what a step costs before anything is asked of it,
`r2` the share of the variance that the line explains.

- population and prompts: the embedded model, one replica per core. Populations are multiples of the replicas', so that
  none waits at the end; all members are asked the same prompts.
- parameters: random models in which no row ends early.
- replicas: members a second with 1, 2, ... replicas of one thread. Threads: one replica of 1, 2, ... threads. The
  embedded model; with fewer than three points no line is judged.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.common import fit_line, medians, options, rounded, settings, write_result
from bench.contestants import Ours, parameters, tiny_coefficients
from bench.models import SHAPES, countdown_prompts, random_prompts, save_random_model

from estune.config import Config
from estune.pool.open import available_cores

SIGMA = {"tiny": 0.012}
NEW_TOKENS = {"tiny": 40}


def open_ours(model: Path | str, prompts: list[list[int]], **more: Any) -> Ours:
    """One replica per core, unless told otherwise."""
    config = Config(model=str(model), **{"replicas": available_cores(), "threads": 1, **more})
    return Ours(config, prompts, NEW_TOKENS.get(str(model), 16))


def step(ours: Ours, population: int, prompts: list[list[int]]) -> None:
    """One step of so many members."""
    ours.prompts = prompts
    seeds = range(population)
    ours.step(seeds, SIGMA.get(ours.config.model, 0.001), tiny_coefficients(seeds))


def curve(what: str, x: list[int], seconds: dict[Any, float]) -> dict[str, Any]:
    """Points and their line."""
    y = list(seconds.values())
    line = fit_line(x, y)
    print(f"{what}: {dict(zip(x, rounded(y), strict=True))}, {rounded(line)}", flush=True)
    return {what: x, "seconds a step": y, **line}


def by_population(ours: Ours, rounds: list[int], prompts: int, repeats: int) -> dict[str, Any]:
    x = [r * len(ours.pool.replicas) for r in rounds]
    asked = countdown_prompts(prompts)
    seconds = medians({n: lambda n=n: step(ours, n, asked) for n in x}, repeats, warm_up=1)
    return {"prompts": prompts, **curve("members", x, seconds)}


def by_prompts(ours: Ours, x: list[int], repeats: int) -> dict[str, Any]:
    members = 2 * len(ours.pool.replicas)
    asked = countdown_prompts(max(x))
    seconds = medians({n: lambda n=n: step(ours, members, asked[:n]) for n in x}, repeats, warm_up=1)
    return {"population": members, **curve("prompts", x, seconds)}


def by_parameters(sizes: list[str], prompts: int, repeats: int) -> dict[str, Any]:
    """Sizes take turns, as everything does; all their replicas are in memory at once."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {size: random_prompts(size, prompts) for size in sizes}
        models = {size: save_random_model(size, Path(folder) / size) for size in sizes}
        ours = {size: open_ours(models[size], asked[size]) for size in sizes}
    members = available_cores()
    seconds = medians(
        {size: lambda size=size: step(ours[size], members, asked[size]) for size in sizes}, repeats, warm_up=1
    )
    engines: list[Any] = [each.replica.engine for each in ours.values()]
    x = [parameters(engine.model) for engine in engines]
    for each in ours.values():
        each.close()
    return {"population": members, "prompts": prompts, "sizes": sizes, **curve("parameters", x, seconds)}


def by_workers(kind: str, prompts: int, repeats: int) -> dict[str, Any]:
    """Members a second against the number of replicas, or of one replica's threads."""
    asked = countdown_prompts(prompts)
    x = [n for n in range(1, available_cores() + 1) if n <= 8 or n % 8 == 0]
    ours = {n: open_ours("tiny", asked, **{"replicas": 1, kind: n}) for n in x}
    members = 2 * max(x)
    seconds = medians({n: lambda n=n: step(ours[n], members, asked) for n in x}, repeats, warm_up=1)
    for each in ours.values():
        each.close()
    rates = [members / s for s in seconds.values()]
    line = fit_line(x, rates) if len(x) > 1 else {}
    print(f"{kind}: {dict(zip(x, rounded(rates), strict=True))}, {rounded(line)}", flush=True)
    return {"population": members, "prompts": prompts, kind: x, "members a second": rates, **line}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All curves."""
    prompts = max(args.prompts) // 2
    ours = open_ours("tiny", countdown_prompts(prompts))
    population = by_population(ours, args.rounds, prompts, args.repeats)
    asked = by_prompts(ours, args.prompts, args.repeats)
    ours.close()
    return {
        "population": population,
        "prompts": asked,
        "parameters": by_parameters(args.sizes, max(1, prompts // 2), args.repeats),
        "replicas": by_workers("replicas", prompts, args.repeats),
        "threads": by_workers("threads", prompts, args.repeats),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="members of each replica")
    parser.add_argument("--prompts", nargs="+", type=int, default=[25, 50, 100, 200, 400])
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M", "3M", "10M", "25M"])
    args = parser.parse_args()
    write_result("scaling", {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

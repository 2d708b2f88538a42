"""How much sigma, alpha and the population matter: sweeps on the embedded model.

    python -m bench.study.sensitivity [--alphas-of 'SETTINGS of bench.study.parts' [--models a,b]]

The study's tasks and prompts a step. On Countdown all runs generate about as many tokens; on conciseness, where the
answers' length is what is trained, they make as many steps. Accuracy is that of the last weights, whatever a run passed
on its way. `--alphas-of` is another measurement: alphas around those settings, with the budget of the parts, on any of
the study's models. The runs stay in runs/sensitivity, and the script goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import options, settings, write_result
from bench.study import compare, parts

from estune.charts.table import spread
from estune.journal.journal import Journal
from estune.study.sweep import Trial, sweep

FOLDER = Path("runs/sensitivity")
SIZES = (0.006, 0.012, 0.024, 0.048)
POPULATIONS = (5, 10, 20, 40, 80)
BUDGET, TOKENS = 300_000, 20.5  # to generate in a run of Countdown; of a completion, about
# On conciseness.
SPREADS, STEPS = (0.006, 0.012, 0.024), 100
METRICS = {"accuracy": "accuracy", "reward": "reward", "kl": "kl", "length": "completions/mean_length"}
# Not those of the study, whose settings were chosen by this.
SEEDS = (1000, 1001, 1002)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def steps_of(budget: float, population: int) -> int:
    """Steps in which so many tokens are generated, by the mean length of the study's completions."""
    return max(1, round(budget / (population * compare.PROMPTS * TOKENS)))


def run(
    folder: Path, jobs: int, sizes: Sequence[str], steps: int, population: int = compare.POPULATION,
    experiment: str = compare.EMBEDDED, prompts: int = compare.PROMPTS, seeds: Sequence[int] = SEEDS,
) -> list[dict[str, Any]]:  # fmt: skip
    """One sweep: a line a run, with its swept settings, its steps and tokens, and what the last weights came to."""
    given = [*compare.model_and_task(experiment), f"sweep.seed={','.join(map(str, seeds))}", *sizes]
    given += [f"population={population}", f"prompts_per_step={prompts}", f"steps={steps}"]
    given += ["eval_steps=0", "replicas=1", "threads=1", "report_to=none", "log_completions=0"]
    trials = sweep(folder, None, given, jobs=jobs)
    return [{"population": population, **_figures(folder, trial)} for trial in trials]


def run_alphas(folder: Path, jobs: int, name: str, model: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Runs of a model with alphas around that of some settings of `bench.study.parts`."""
    around = parts.PAPER | parts.SETTINGS[name]
    alpha, population, prompts = (around.pop(key) for key in ("learning_rate", "population", "prompts_per_step"))
    alphas = [f"{alpha * factor:g}" for factor in FACTORS]
    given = [f"sweep.learning_rate={','.join(alphas)}", *(f"{key}={value}" for key, value in around.items())]
    steps = round(parts.BUDGET / (population * prompts * parts.TOKENS))
    found = run(folder / model, jobs, given, steps, population, model, prompts, seeds)
    return [{"model": model, **figures} for figures in found]


def alphas_table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Mean accuracy in percent, with the deviation over seeds: a row for each model, a column for each alpha."""
    alphas = sorted({r["learning_rate"] for r in runs}, key=float)
    models = list(dict.fromkeys(r["model"] for r in runs))
    head = ["accuracy % \\ alpha", *alphas]
    return [head, *([model, *(_cell(runs, model=model, learning_rate=alpha) for alpha in alphas)] for model in models)]


def _figures(folder: Path, trial: Trial) -> dict[str, Any]:
    if trial.error is not None:
        return {**trial.values, "error": trial.error}
    journal = Journal.read(folder / trial.name)
    last = journal.evaluations[-1]
    tokens = journal.history[-1].metrics["num_tokens"]
    metrics = {key: last.metrics[f"eval_{name}"] for key, name in METRICS.items()}
    return {**trial.values, "steps": last.step, "tokens": tokens, **metrics}


def grid_table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Mean accuracy in percent, with the deviation over seeds: a row for each sigma, a column for each alpha."""
    head = ["sigma \\ alpha", *(f"{alpha:g}" for alpha in SIZES)]
    return [head, *([f"{s:g}", *(_cell(runs, sigma=f"{s:g}", learning_rate=f"{a:g}") for a in SIZES)] for s in SIZES)]


def population_table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The same for each population."""
    rows = [[str(n), str(steps_of_runs(runs, n)), _cell(runs, population=n)] for n in POPULATIONS]
    return [["N", "steps", "accuracy %"], *rows]


def conciseness_table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Accuracy, reward, length and divergence on conciseness for each sigma."""
    columns = (("accuracy %", "accuracy", 100.0, 1), ("reward", "reward", 1.0, 1), ("length", "length", 1.0, 1),
               ("KL", "kl", 1.0, 3))  # fmt: skip
    rows = []
    for sigma in (f"{s:g}" for s in SPREADS):
        found = [r for r in runs if r["sigma"] == sigma and "error" not in r]
        rows.append([sigma, *(spread([factor * r[key] for r in found], digits) for _, key, factor, digits in columns)])
    return [["sigma", *(heading for heading, *_ in columns)], *rows]


def steps_of_runs(runs: Sequence[Mapping[str, Any]], population: int) -> int:
    """Steps of the runs with this population."""
    return next(r["steps"] for r in runs if r["population"] == population and "steps" in r)


def _cell(runs: Sequence[Mapping[str, Any]], **values: Any) -> str:
    found = [100 * r["accuracy"] for r in runs if values.items() <= r.items() and "accuracy" in r]
    return spread(found, 1)


def main() -> None:
    """Sweep both and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET, help="generated tokens a run on Countdown, about")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--alphas-of", metavar="SETTINGS", help="measure alphas around these, and nothing else")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with --alphas-of")
    parser.add_argument("--models", default=compare.EMBEDDED, help="with --alphas-of, of bench.study.compare")
    arguments = parser.parse_args()
    if arguments.alphas_of:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        alphas = [
            found
            for model in arguments.models.split(",")
            for found in run_alphas(FOLDER / "alphas", arguments.jobs, arguments.alphas_of, model, seeds)
        ]
        write_result("alphas", {"settings": settings(arguments), "alphas": alphas}, arguments.results)
        return
    sizes = ",".join(map(str, SIZES))
    swept = [f"sweep.sigma={sizes}", f"sweep.learning_rate={sizes}"]
    budget, jobs = arguments.budget, arguments.jobs
    grid = run(FOLDER / "sizes", jobs, swept, steps_of(budget, compare.POPULATION))
    populations = [
        r
        for n in POPULATIONS
        for r in run(FOLDER / f"population-{n}", jobs, compare.SIZES, steps_of(budget, n), population=n)
    ]
    spreads = [f"sweep.sigma={','.join(map(str, SPREADS))}", *compare.SIZES[1:]]
    conciseness = run(FOLDER / "conciseness", jobs, spreads, STEPS, experiment=compare.CONCISENESS)
    figures = {
        "settings": settings(arguments), "grid": grid, "populations": populations, "conciseness": conciseness,
    }  # fmt: skip
    write_result("sensitivity", figures, arguments.results)


if __name__ == "__main__":
    main()

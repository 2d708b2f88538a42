"""What mean accuracy after a blind run does not show: objectives over several completions, going back, flat optima.

    python -m bench.study.compare models        first: pretrain the small models
    python -m bench.study.objectives [--models a,b] [--settings 'mean of four;best of four'] [--seeds 0,1,2]

Countdown, and about as many tokens a run, as in `bench.study.parts`. Runs of the first kind have four completions of
each prompt at temperature 1, whose mean or best of k is a prompt's score; of the second, steps twice as large as are
good, with and without a way back, and held-out problems evaluated every five steps, of which the run knows; of the
third, sharpness-aware steps, for weights that bear being rounded. Each is evaluated at its end greedily, by 16
completions of each held-out problem, and with its matrices rounded to integers. Results are `objectives.jsonl`, a line
a run; what is there is not run again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import add_missing, machine, options, read_lines
from bench.study.compare import COUNTDOWN, model_and_task
from bench.study.parts import BUDGET, PAPER, TOKENS
from bench.study.real import figures, judged

from estune import Trainer
from estune.charts.table import markdown
from estune.config import load
from estune.engines.transformers import TransformersEngine
from estune.journal.journal import Journal
from estune.weights.grid import LEVELS, Grid

SAMPLES, EVERY = 16, 5
ROUNDED, GROUP = (8, 4), 32  # bits, and weights that share a scale
FOUR = {"samples_per_prompt": 4, "prompts_per_step": 5, "temperature": 1.0}
LARGE = {"learning_rate": 0.024}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mean of four": FOUR,
    "best of two of four": {**FOUR, "best_of": 2},
    "best of four": {**FOUR, "best_of": 4},
    "lower quartile": {"reward_quantile": 0.25},
    "upper quartile": {"reward_quantile": 0.75},
    "double alpha": LARGE,
    "double alpha, back to the best": {**LARGE, "back_to_best": 0.03},
    "double alpha, guarded": {**LARGE, "guard": 0.5},
    "double alpha, guarded, back to the best": {**LARGE, "guard": 0.5, "back_to_best": 0.03},
    "sharpness-aware, twice as long": {"sam_rho": 0.1, "steps": 54},
    "sharpness-aware, twice as long, three times as far": {"sam_rho": 0.3, "steps": 54},
}
COLUMNS = {  # what is shown, by its heading: the figure, its factor and its digits
    "greedy %": ("accuracy", 100, 1),
    "best %": ("best", 100, 1),
    **{f"int{bits} %": (f"int{bits}", 100, 1) for bits in ROUNDED},
    **{f"pass@{k} %": (f"eval_pass@{k}", 100, 1) for k in (1, 4, SAMPLES)},
    "went back": ("back", 1, 1),
    "guarded": ("taken_back", 1, 1),
    "seconds": ("seconds", 1, 0),
}


def run(model: str, name: str, seed: int) -> dict[str, Any]:
    """One run, and what it came to."""
    changes = {**PAPER, **SETTINGS[name]}
    completions = changes["population"] * changes["prompts_per_step"] * changes.get("samples_per_prompt", 1)
    changes = {"steps": round(BUDGET / (completions * TOKENS)), "eval_steps": EVERY, "seed": seed} | changes
    given = [*model_and_task(model), "dtype=float32", *(f"{key}={value}" for key, value in changes.items())]
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, [*given, f"output_dir={folder}/run"]).model_copy(
            update={"report_to": [], "compare_with_base": False, "log_completions": 0, "save_dtype": "float32"}
        )
        trainer = Trainer(config, monitors=[])
        summary = trainer.train()
        journal = Journal.read(summary.run)
        engine = TransformersEngine(trainer.run.final, dtype=config.dtype)
        sampled = judged(engine, config.model_copy(update={"eval_samples": SAMPLES, "eval_temperature": 1.0}))
        of_integers = {f"int{bits}": judged(rounded(trainer.run.final, bits), config) for bits in ROUNDED}
    curve = {e.step: e.metrics["eval_accuracy"] for e in journal.evaluations}
    return {
        "model": model,
        "settings": name,
        "seed": seed,
        "accuracy": judged(engine, config)["eval_accuracy"],
        "best": max(curve.values()),
        **{name: metrics["eval_accuracy"] for name, metrics in of_integers.items()},
        **{key: value for key, value in sampled.items() if "@" in key},
        "back": sum(e.back is not None for e in journal.evaluations),
        "taken_back": sum(s.metrics.get("taken_back", 0) for s in journal.steps),
        "tokens": journal.steps[-1].metrics["num_tokens"],
        "seconds": summary.seconds,
        "curve": curve,
        "machine": machine(),
    }


def rounded(checkpoint: Path, bits: int) -> TransformersEngine:
    """A checkpoint with its matrices rounded to the nearest integers, of which `GROUP` neighbours share a scale."""
    engine = TransformersEngine(checkpoint, dtype="float32")
    grid = Grid(bits, GROUP, carry_steps=1)
    for matrix in engine.model.parameters():
        if matrix.ndim > 1 and matrix.shape[-1] % GROUP == 0:
            weights = matrix.detach().numpy().reshape(-1)
            scales = grid.scales(weights)
            weights[:] = grid.values(grid.codes(weights, scales, LEVELS[bits]), scales)
    return engine


def section(results: Path) -> list[str]:
    """The page's part about it: a table a model."""
    path = results / "objectives.jsonl"
    runs = read_lines(path)
    found = [
        "### Objectives, going back, and flat optima",
        "Runs whose point is not greedy accuracy, or not a blind run's (`bench.study.objectives`): the same models\n"
        "and about as many tokens, but where a name says other, at the end greedily and by\n"
        f"{SAMPLES} completions at temperature 1. `best` is the best evaluation of the run, every {EVERY} steps; int8\n"
        f"and int4 are greedy accuracy with all matrices rounded, embeddings too, {GROUP} neighbours to a scale; then\n"
        "how often a run went back to its best, and how often a step was taken back by the guard. Seconds are by the\n"
        "clock, evaluations and all, on a busy machine.",
    ]
    for model in COUNTDOWN:
        if of := [run for run in runs if run["model"] == model]:
            found += [f"#### {model}", markdown(table(of))]
    return found if runs else []


def table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each of the settings, means over seeds."""
    by_name = {name: [run for run in runs if run["settings"] == name] for name in SETTINGS}
    return figures({name: of for name, of in by_name.items() if of}, COLUMNS)


def main() -> None:
    """All of it, the first seed of every one first."""
    parser = options(__doc__)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(COUNTDOWN))
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    arguments = parser.parse_args()
    wanted = (
        {"model": model, "settings": name, "seed": seed}
        for seed in arguments.seeds
        for model in arguments.models
        for name in arguments.settings
    )
    for line in add_missing(arguments.results / "objectives.jsonl", wanted, run):
        print(line["model"], line["settings"], line["seed"], table([line])[1][2:], flush=True)


if __name__ == "__main__":
    main()

"""A task that is learned while another is kept: SmolLM2-135M-Instruct learns brevity, and is to keep its capitals.

    python -m bench.study.kept [--settings 'bound;both'] [--seeds 0,1,2]

What `bench.study.real` has of conciseness by 96 members is the run without the other task. Here each step's prompts are
of both, two of conciseness for one of capitals: `bound` has a bound on what is right of the latter, whose rewards count
nothing, and `both` has their rewards instead. Results are `kept.jsonl`, a line a run; what is there is not run again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import add_missing, machine, options, read_lines
from bench.study.real import BASE, ES, MANY, TASKS, figures, judged, settings

from estune import Trainer
from estune.charts.table import markdown
from estune.config import load
from estune.engines.transformers import TransformersEngine
from estune.journal.journal import Journal

STEPS, PROMPTS, LONGEST = 13, 6, 64  # the most steps of a run without the other task, and four of its prompts in each
RIGHT = 0.44  # of the base model's capitals
SETTINGS: dict[str, tuple[str, ...]] = {
    "bound": (
        "task.tasks.capitals.name=bench/study/capitals_watched.py",
        f"constraint=rewards/capitals/correct_reward/mean>={RIGHT}",
    ),
    "both": ("task.tasks.capitals.name=examples/capitals.py",),
}
COLUMNS = {  # what is shown, by its heading: the figure, its factor and its digits
    "right %": ("conciseness/eval_accuracy", 100, 1),
    "tokens": ("conciseness/eval_completions/mean_length", 1, 1),
    "capitals %": ("capitals/eval_accuracy", 100, 1),
    "additions %": ("additions/eval_accuracy", 100, 1),
    "penalty": ("penalty", 1, 2),
    "1,000 tokens": ("tokens", 1e-3, 0),
    "seconds by the clock": ("seconds", 1, 0),
}


def run(name: str, seed: int) -> dict[str, Any]:
    """One run, and what it came to on each of the tasks."""
    given = [
        *ES, *MANY, "task.name=mix", "task.tasks.conciseness.name=conciseness", "task.weights.conciseness=2",
        f"prompts_per_step={PROMPTS}", f"max_new_tokens={LONGEST}", f"steps={STEPS}", f"seed={seed}", "eval_steps=0",
        *SETTINGS[name],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, [*given, f"output_dir={folder}/run"]).model_copy(
            update={"report_to": [], "compare_with_base": False, "log_completions": 0}
        )
        trainer = Trainer(config, monitors=[])
        summary = trainer.train()
        journal = Journal.read(summary.run)
        found = measured(trainer.run.final)
    return {
        "settings": name,
        "seed": seed,
        **found,
        "penalty": journal.steps[-1].state.get("penalty"),
        "tokens": journal.steps[-1].metrics["num_tokens"],
        "seconds": summary.seconds,
        "machine": machine(),
    }


def measured(checkpoint: Path) -> dict[str, float]:
    """Greedy figures of a checkpoint on each task, under its name."""
    engine = TransformersEngine(checkpoint, dtype="bfloat16")
    return {
        f"{task}/{key}": value
        for task in TASKS
        for key, value in judged(engine, settings(task).model_copy(update={"eval_temperature": 0.0})).items()
        if key in ("eval_accuracy", "eval_reward", "eval_completions/mean_length")
    }


def section(results: Path) -> list[str]:
    """The page's part about it."""
    runs = read_lines(results / "kept.jsonl")
    found = [
        "### A task kept while another is learned",
        "SmolLM2-135M-Instruct learns conciseness by 96 members as above, and each step has a question about a\n"
        "capital for two of its prompts (`bench.study.kept`): with a bound, that as many of them are right as the\n"
        f"base has, {RIGHT}; or with their own rewards. `alone` is the run above, without them.",
        markdown(table(runs, read_lines(results / "real-conciseness.jsonl"))),
    ]
    return found if runs else []


def table(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> list[list[str]]:
    """A row for each of the settings, means over seeds.

    Args:
        runs: of this study.
        others: of conciseness in `bench.study.real`.
    """
    before = next((line["base_accuracy"] for line in others if "base_accuracy" in line), None)
    rows = {
        "before": [
            {**_as_here(line), "conciseness/eval_accuracy": before} for line in others if line["job"]["method"] == BASE
        ],
        "alone": [_as_here(line) for line in others if line.get("settings") == "96 members"],
        **{name: [run for run in runs if run["settings"] == name] for name in SETTINGS},
    }
    return figures({name: of for name, of in rows.items() if of}, COLUMNS)


def _as_here(line: Mapping[str, Any]) -> dict[str, Any]:
    """A run of `bench.study.real` under the names of this study's figures."""
    names = {
        "accuracy": "conciseness/eval_accuracy",
        "length": "conciseness/eval_completions/mean_length",
        "watch/capitals": "capitals/eval_accuracy",
        "watch/additions": "additions/eval_accuracy",
        "tokens": "tokens",
        "seconds": "seconds",
    }
    return {there: line[here] for here, there in names.items() if here in line}


def main() -> None:
    """All of it, the first seed of every one first."""
    parser = options(__doc__)
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=list(SETTINGS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    arguments = parser.parse_args()
    wanted = ({"settings": name, "seed": seed} for seed in arguments.seeds for name in arguments.settings)
    for line in add_missing(arguments.results / "kept.jsonl", wanted, run):
        print(line["settings"], line["seed"], table([line])[1][2:], flush=True)


if __name__ == "__main__":
    main()

"""What training integer weights costs in accuracy, and what it is worth to carry on what rounding cuts off.

    python -m bench.study.quantized [--seeds 0,1] [--ways 'int4;master']

The embedded model learns Countdown with its own settings, but in 20 steps, from the same seeds and prompts, in ways
that differ in how weights are held alone: in float32, and as integers of 8 and 4 bits, with the update's rounding error
carried on and without. Records held-out accuracy by step, greedily, on 400 problems. Results are `quantized.jsonl`, a
line a run; what is there is not run again. What is carried on is kept here, as it takes less time and gives the same
bits.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import add_missing, machine, options, read_lines

from estune import Config, Trainer
from estune.charts.table import markdown
from estune.journal.journal import Journal

STEPS = 20
INTEGER = {"weights_group_size": 64, "carry": "keep"}
NAIVE = {**INTEGER, "carry_steps": 1, "rounding": "nearest"}
WAYS: dict[str, dict[str, Any]] = {
    "master": {},
    "master, of the same matrices": {"train_parameters": "*_proj.weight"},
    "int8": {"weights": "int8", **INTEGER},
    "int4": {"weights": "int4", **INTEGER},
    "int8, rounded to nearest, nothing carried": {"weights": "int8", **NAIVE},
    "int4, rounded to nearest, nothing carried": {"weights": "int4", **NAIVE},
    "int4, rounded stochastically, nothing carried": {"weights": "int4", **NAIVE, "rounding": "stochastic"},
    "int4, rounded to nearest": {"weights": "int4", **INTEGER, "rounding": "nearest"},
}


def run(way: str, seed: int) -> dict[str, Any]:
    """One run, and what it came to."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        config = Config(
            output_dir=place, seed=seed, steps=STEPS, eval_steps=STEPS // 2, report_to=[], compare_with_base=False,
            log_completions=0, replicas=1, **WAYS[way],
        )  # fmt: skip
        Trainer(config, monitors=[]).train()
        journal = Journal.read(place)
    return {
        "way": way,
        "seed": seed,
        "accuracy": {e.step: e.metrics["eval_accuracy"] for e in journal.evaluations},
        "tokens": journal.steps[-1].metrics["num_tokens"],
        "seconds": round(time.perf_counter() - start),
        "update_seconds": round(sum(s.metrics["time/update"] for s in journal.steps), 1),
        "perturb_seconds": round(sum(s.metrics["time/perturb"] for s in journal.steps), 1),
        "settings": WAYS[way],
        "machine": machine(),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Accuracy before the first step and after the last, by way, means over seeds."""
    rows = [["weights", "seeds", "before", "after", "of each seed"]]
    for way in WAYS:
        found = [each["accuracy"] for each in runs if each["way"] == way]
        if found:
            first, last = ([list(each.values())[i] for each in found] for i in (0, -1))
            values = ", ".join(f"{value:.1%}" for value in last)
            rows.append(
                [way, str(len(found)), f"{statistics.fmean(first):.1%}", f"{statistics.fmean(last):.1%}", values]
            )
    return markdown(rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="with semicolons between")
    arguments = parser.parse_args()
    path = arguments.results / "quantized.jsonl"
    wanted = ({"way": way, "seed": seed} for seed in arguments.seeds for way in arguments.ways)
    for line in add_missing(path, wanted, run):
        print(line["way"], line["seed"], line["accuracy"], f"{line['seconds']} s", flush=True)
    print(table(read_lines(path)))


if __name__ == "__main__":
    main()

"""What `estune estimate` says of a step, against steps that were measured.

    python -m bench.speed.estimated [--cases tiny:128:1 tiny:20:20 smollm2:8:8] [--steps 6] [--noise rank1 iid]

Each case is a run of `estune train` in a process of its own, without evaluations; the median of its steps counts, the
first left out, in which kernels are compiled. Then the estimate is made for the same settings on the same machine, with
the run's own lengths and the mean length of its prompts. An estimate leaves out grading and files, so that these are
taken off. Run it on a quiet machine: both halves are measurements.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import options, read_lines, rounded, settings, write_result

from estune.config import load
from estune.engines.tokenizer import open_encoder
from estune.run.held_out import token_ids
from estune.study.estimate.needs import total
from estune.study.estimate.run import estimate_run

OWN = {
    "tiny": ["task.name=countdown"],
    "smollm2": ["task.name=examples/capitals.py", "max_new_tokens=16", "sigma=0.004"],
}


def measured(given: list[str], folder: Path) -> dict[str, float]:
    """Seconds of a run's steps and their parts."""
    command = [sys.executable, "-m", "estune.cli", "train", *given, f"output_dir={folder}", "eval_on_start=false"]
    subprocess.run([*command, "eval_steps=0"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "step_time" in line][1:]
    return {key: statistics.median(step[key] for step in steps) for key in ("step_time", "time/grade")}


def compare(case: str, noise: str, steps: int) -> dict[str, Any]:
    """One case: model, population and prompts."""
    model, population, prompts = case.split(":")
    given = [f"model={model}", f"population={population}", f"prompts_per_step={prompts}", f"noise={noise}"]
    given += OWN[model]
    config = load(None, given)
    task = config.task.build(config.seed)
    ids = token_ids(open_encoder(config), task, task.train)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seconds = measured([*given, f"steps={steps}"], run)
        found = estimate_run(None, given, prompt_tokens=round(sum(map(len, ids)) / len(ids)), lengths=run)
    step = seconds["step_time"] - seconds["time/grade"]
    said = total(found.time)
    return {
        "measured": step,
        "estimated": said,
        "estimated / measured": said / step,
        "engines": found.work.engines,
        "dtype": found.work.dtype,
        "members together": found.work.together,
        "parts": {item.name: item.amount for item in found.time},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=["tiny:128:1", "tiny:20:20", "smollm2:8:8"])
    parser.add_argument("--noise", nargs="+", default=["rank1", "iid"])
    parser.add_argument("--steps", type=int, default=6)
    arguments: argparse.Namespace = parser.parse_args()
    found = {}
    for case in arguments.cases:
        for noise in arguments.noise:
            found[f"{case}, {noise}"] = compare(case, noise, arguments.steps)
            print(case, noise, rounded(found[f"{case}, {noise}"]), flush=True)
    write_result("estimated", {"settings": settings(arguments), **rounded(found)}, arguments.results)


if __name__ == "__main__":
    main()

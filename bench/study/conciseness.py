"""The conciseness task on the embedded model, for several run seeds: seconds, answers' length and held-out correctness.

    python -m bench.study.conciseness

Each run is a process of its own, from the command to the last line of its summary, loading included; "processor
seconds" are of all its processes together, which other work on the machine changes less. Length is the mean number of
tokens of a held-out answer, its end token included; correct is the share that holds the right word. "Best" is the
checkpoint that a run keeps: the highest correctness and, among equals, the highest reward.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import options, rounded, write_result

from estune.journal.journal import Journal


def run(seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    output = folder / str(seed)
    command = [sys.executable, "-m", "estune.cli", "train", "--task", "conciseness", "--seed", str(seed)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--output-dir", str(output), *settings], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    evaluations = Journal.read(output).evaluations
    best = max(evaluations, key=lambda e: (e.metrics["eval_accuracy"], e.metrics["eval_reward"]))
    figures = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "processor seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "length": {e.step: e.metrics["eval_completions/mean_length"] for e in evaluations},
        "correct": {e.step: e.metrics["eval_accuracy"] for e in evaluations},
        "best": {"step": best.step, "length": best.metrics["eval_completions/mean_length"],
                 "correct": best.metrics["eval_accuracy"]},
    }  # fmt: skip
    print(rounded(figures), flush=True)
    return figures


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="settings, --key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder), arguments.settings) for seed in range(arguments.seeds)]
    figures = {
        "slowest seconds": max(r["seconds"] for r in runs),
        "most processor seconds": max(r["processor seconds"] for r in runs),
        "length before": runs[0]["length"][0],
        "length after, longest": max(list(r["length"].values())[-1] for r in runs),
        "correct before": runs[0]["correct"][0],
        "correct after, lowest": min(list(r["correct"].values())[-1] for r in runs),
        "runs": runs,
    }
    write_result("conciseness", rounded(figures), arguments.results)


if __name__ == "__main__":
    main()

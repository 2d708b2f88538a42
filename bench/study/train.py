"""The main job, as `make train` runs it, for several run seeds: seconds and held-out accuracy; and the time of imports.

    python -m bench.study.train
    python -m bench.study.train --name sums --seeds 2 -- --task examples/sums.py --steps 20 --prompts_per_step 64

Each run is a process of its own, from the command to the last line of its summary, loading included. Processor seconds
are of all its processes, and the peak is of the largest of them; tokens are those that its steps have generated.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import options, write_result

from estune.journal.journal import Journal

IMPORTS = ("estune", "estune.config", "estune.cli")


def run(seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    output = folder / str(seed)
    command = [sys.executable, "-m", "estune.cli", "train", "--seed", str(seed), "--output-dir", str(output), *settings]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    journal = Journal.read(output)
    accuracy = {str(e.step): round(e.metrics["eval_accuracy"], 4) for e in journal.evaluations}
    step = statistics.median(r.metrics["step_time"] for r in journal.steps)
    figures = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "seconds a step": round(step, 3),
        "processor seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak GiB": round(used.ru_maxrss / 2**20, 2),
        "tokens": journal.steps[-1].metrics["num_tokens"],
        "accuracy": accuracy,
    }
    print(figures, flush=True)
    return figures


def import_seconds(module: str, repeats: int = 7) -> float:
    """Median seconds to import a module in a fresh interpreter, the interpreter's own start taken off."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    found = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]
    return round(statistics.median(found), 3)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed, of the first run")
    parser.add_argument("--name", default="train", help="of the result, for a job with other settings")
    parser.add_argument("settings", nargs="*", help="settings of another job, after `--`")
    arguments = parser.parse_args()
    imports = {module: import_seconds(module) for module in IMPORTS}
    print(imports)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            runs.append(run(seed, Path(folder), arguments.settings))
            write_result(arguments.name, summary(imports, runs), arguments.results)  # as far as it has come


def summary(imports: dict[str, float], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is recorded of these runs."""
    last = [list(r["accuracy"].values())[-1] for r in runs]
    first = [next(iter(r["accuracy"].values())) for r in runs]
    return {
        "import seconds": imports,
        "median seconds": statistics.median(r["seconds"] for r in runs),
        "accuracy before": [min(first), max(first)],
        "accuracy after": [min(last), max(last)],
        "runs": runs,
    }


if __name__ == "__main__":
    main()

"""What a step costs beside generation, for the embedded model at its default settings.

    python -m bench.overhead

A step's wall time runs from the end of one step to the end of the next: encoding, perturbing, generating, grading,
update, fingerprint, the journal's line on disk, metrics, completions as parquet. Generation is the time that engines
spend in `generate`, averaged over the engines of the process. The overhead is what remains, as a share of the wall
time. It includes the wait at a step's end, when one engine still generates and the other has no member left.

The parts: perturbing is averaged over engines as generation is; grading, updating (with the fingerprint) and the
journal happen once a step, grading mostly while engines go on.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import write_result

from estune.config import load
from estune.journal import StepRecord
from estune.monitors.base import Metrics, Monitor, Sample
from estune.monitors.files import JsonlMonitor
from estune.trainer import Trainer


class Clock(Monitor):
    """Notes when each step ends, and its metrics."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        self.ends.append(time.perf_counter())
        self.metrics.append(dict(metrics))


def timed(call: Callable[[StepRecord], None], seconds: list[float]) -> Callable[[StepRecord], None]:
    def timing(record: StepRecord) -> None:
        start = time.perf_counter()
        call(record)
        seconds.append(time.perf_counter() - start)

    return timing


def measure(steps: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Medians over all steps but the first, which compiles and warms up."""
    fixed = [f"steps={steps + 1}", "eval_steps=0", f"output_dir={folder / 'run'}"]
    config = load(None, [*fixed, *overrides])
    clock, journal = Clock(), list[float]()
    trainer = Trainer(config, monitors=[clock, JsonlMonitor(folder / "metrics.jsonl")])
    replicas = len(trainer.pool.replicas)
    trainer.journal.append_step = timed(trainer.journal.append_step, journal)  # type: ignore[assignment,method-assign]
    trainer.train()

    rows = []
    for i in range(1, len(clock.ends)):
        m, wall = clock.metrics[i], clock.ends[i] - clock.ends[i - 1]
        generate = m["time/generate"] / replicas
        rows.append(
            {
                "step": wall,
                "generate": generate,
                "overhead": wall - generate,
                "perturb": m["time/perturb"] / replicas,
                "grade": m["time/grade"],
                "update and fingerprint": m["time/update"],
                "journal": journal[i],
                "after the journal": wall - m["step_time"],
            }
        )
    seconds = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    shares = {key: statistics.median(row[key] / row["step"] for row in rows) for key in rows[0] if key != "step"}
    return {
        "steps": len(rows),
        "population": config.population,
        "prompts_per_step": config.prompts_per_step,
        "replicas": replicas,
        "seconds a step": {key: round(value, 4) for key, value in seconds.items()},
        "percent of a step": {key: round(100 * value, 2) for key, value in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a step's overhead.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("settings", nargs="*", help="settings, key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments.steps, Path(folder), arguments.settings)
    write_result("overhead", figures)


if __name__ == "__main__":
    main()

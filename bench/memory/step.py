"""Memory of one training step of SmolLM2, by ES and by reinforcement learning, and what of it is not libraries.

    python -m bench.memory.step [--micro-batches 32 8 2] [--experiment capitals]

Each row is a process of its own that does what a run of `bench.study.real` does until its first step is over: ES with
the paper's noise and with noise of rank one, and TRL's GRPO with 96 completions a step, of which as many as
`--micro-batches` says go through a backward pass at once. `peak, GB` is the most that the process has held, and
`step, GB` what that is above a process that has loaded the same libraries and no model: weights and all that a step
takes. Of GRPO's, float32 weights, gradients and Adam's two moments are four times 0.54 GB. Linux only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import psutil
from bench.common import options, rounded, settings, write_result
from bench.processes import Process
from bench.study.real import settings as of_experiment

ES = {"ES": "", "ES, rank one": "rank one"}  # row: settings of `bench.study.real`
COMPLETIONS = 96  # of a step of reinforcement learning, as there
RATE = 3e-6


class Measured:
    """A process that tells how much memory (bytes) it has held."""

    def libraries(self, method: str) -> int:
        """With what a method imports, and no model."""
        import estune.engines.transformers
        import estune.run.trainer  # noqa: F401

        if method != "es":
            from trl import GRPOConfig, GRPOTrainer  # noqa: F401
        return int(psutil.Process().memory_info().rss)

    def step(self, experiment: str, other: str, method: str, micro_batch: int) -> int:
        """At most, for a job of a comparison whose budget the first step spends."""
        from estune.pool.open import with_resources
        from estune.study.compare.plan import Job, Plan
        from estune.study.compare.train import run

        config = with_resources(of_experiment(experiment, other).model_copy(update={"replicas": 1}))
        plan = Plan.model_validate({"budget": 1, "batch": COMPLETIONS, "micro_batch": micro_batch})
        job = Job.model_validate({"method": method, "seed": 0, "rate": None if method == "es" else RATE})
        with tempfile.TemporaryDirectory() as folder:
            return int(run(plan, job, config, Path(folder))["memory"])


def measure(*arguments: Any) -> int:
    """What a process of its own tells."""
    process = Process(Measured)
    found, _ = process.call(1, *arguments)
    process.close()
    return int(found)


def main() -> None:
    """All rows."""
    parser = options(__doc__)
    parser.add_argument("--experiment", default="capitals")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[32, 8, 2])
    arguments = parser.parse_args()
    rows = {name: (other, "es", 1) for name, other in ES.items()}
    rows |= {f"GRPO, micro-batch {size}": ("", "grpo", size) for size in arguments.micro_batches}
    libraries = {method: measure("libraries", method) for method in ("es", "grpo")}
    result = {}
    for name, (other, method, micro_batch) in rows.items():
        peak = measure("step", arguments.experiment, other, method, micro_batch)
        result[name] = {"peak, GB": peak / 1e9, "step, GB": (peak - libraries[method]) / 1e9}
        print(name, result[name], flush=True)
    write_result("micro_batches", {"settings": settings(arguments), **rounded(result)}, arguments.results)


if __name__ == "__main__":
    main()

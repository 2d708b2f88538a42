"""Rollouts that wait outside of the model, some of them long: what hides that, and what each way brings.

    python -m bench.speed.stragglers [--steps 6] [--repeats 3]

The embedded model in an environment of one to three turns, each of which waits as a tool or a server would: times are
drawn from a lognormal distribution (median 50 ms, sigma 1.5 of the logarithm, at most 4 s), by row and turn alone, so
that all ways wait for the same. Ways are numbers of replicas, and `max_staleness`. Each is a whole run, and they take
turns; seconds are those of a step, the median of all steps but the first, which compiles, and the last, behind which
nothing begins. `waiting` is the least that a step could take with one member at a time and nothing to compute: the
longest rollout, times the members.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result

from estune import Config, Task, Trainer
from estune.grading.rollout import FromRollout, Rollout
from estune.journal.journal import Journal

WAYS = {"replicas=2": (2, 0), "replicas=4": (4, 0), "replicas=2, stale": (2, 1), "replicas=4, stale": (4, 1)}
POPULATION, PROMPTS = 10, 16


def waits(row: Mapping[str, Any]) -> list[float]:
    """Seconds of each turn of a row."""
    chance = random.Random(f"waits {row['number']}")
    return [min(4.0, chance.lognormvariate(-3.0, 1.5)) for _ in range(1 + row["number"] % 3)]


class Tool:
    """An environment whose turns take time, but nothing of this machine."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def reset(self, row: Mapping[str, Any]) -> str:
        """As `Environment.reset`."""
        self.waits = waits(row)
        return str(row["prompt"])

    def step(self, completion: str) -> str | float:
        """As `Environment.step`."""
        time.sleep(self.waits.pop(0))
        return "And then?" if self.waits else len(set(completion)) / 100


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    from bench.speed.stragglers import Tool  # as replicas' processes import it, not this script's own

    rows = [{"prompt": f"What is {n} plus {7 * n % 31}?", "number": n} for n in range(200)]
    task = Task(
        name="tool", train=rows[:-1], evaluation=rows[-1:], reward_funcs=[FromRollout()], reward_weights=[1.0],
        accuracy="rollout", rollout=Rollout("environment", Tool),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stale: dict[str, list[float]] = {way: [] for way in WAYS}
    longest = 0.0
    for repeat in range(arguments.repeats):
        for way, (replicas, staleness) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                config = Config(
                    output_dir=run, steps=arguments.steps, population=POPULATION, seed=repeat,
                    prompts_per_step=PROMPTS, max_new_tokens=24, eval_steps=0, eval_on_start=False, report_to=[],
                    replicas=replicas, threads=1, max_staleness=staleness,
                )  # fmt: skip
                Trainer(config, task=task, monitors=[]).train()
                steps = Journal.read(run).steps[1:-1]
            seconds[way] += [step.metrics["step_time"] for step in steps]
            stale[way] += [step.metrics.get("staleness", 0.0) for step in steps]
            longest = statistics.fmean(max(sum(waits(rows[i])) for i in step.prompts) for step in steps)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    plain = medians["replicas=2"]
    result = {
        "settings": settings(arguments),
        "population": POPULATION,
        "prompts": PROMPTS,
        "waiting": rounded(longest * POPULATION),
        "seconds_of_a_step": rounded(medians),
        "faster_than_two_replicas": rounded({way: plain / each for way, each in medians.items()}),
        "stale_members": rounded({way: statistics.fmean(each) for way, each in stale.items()}),
    }
    write_result("stragglers", result, arguments.results)


if __name__ == "__main__":
    main()

"""What it costs to learn from members of a base that lacks an update.

    python -m bench.study.staleness [--seeds 3] [--steps 20]

The embedded model learns Countdown with its own settings, once with members of up-to-date bases and once with as many
stale ones as there can be: each step's update waits until all of the next step's members have been evaluated, so that
but for the first step after an evaluation every member lacks one update. With stragglers fewer are stale
(`bench.speed.stragglers`). Records held-out accuracy by step.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result

from estune import Config, Trainer
from estune.es.strategy import Update
from estune.journal.journal import Journal
from estune.pool.base import Evaluated, Evaluation


def accuracies(seed: int, steps: int, *, stale: bool) -> tuple[dict[int, float], float]:
    """Held-out accuracy by step, and the share of members that were stale."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = Config(
            output_dir=run, steps=steps, seed=seed, eval_steps=steps // 2, max_staleness=int(stale), report_to=[],
            save_steps=0, compare_with_base=False, log_completions=0,
        )  # fmt: skip
        trainer = Trainer(config, monitors=[])
        if stale:
            wait_for_those_ahead(trainer)
        trainer.train()
        journal = Journal.read(run)
    lacking = [record.metrics.get("staleness", 0.0) for record in journal.steps]
    return {e.step: e.metrics["eval_accuracy"] for e in journal.evaluations}, statistics.fmean(lacking)


class Waited:
    """An evaluation whose end can be waited for before its results are taken.

    Args:
        evaluation: the pool's.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._done: list[tuple[int, Evaluated]] = []

    def wait(self) -> None:
        """Wait until all members have been evaluated."""
        self._done += self._evaluation

    def close(self) -> None:
        """As `Evaluation.close`."""
        self._evaluation.close()

    def __iter__(self) -> Iterator[tuple[int, Evaluated]]:
        yield from self._done
        yield from self._evaluation


def wait_for_those_ahead(trainer: Trainer) -> None:
    """Have each update made only when all members that were given ahead are done."""
    evaluate, apply = trainer.pool.evaluate, trainer.pool.apply
    given: list[Waited] = []

    def remember(*arguments: Any) -> Any:
        given.append(Waited(evaluate(*arguments)))
        return given[-1]

    def late(update: Update) -> str:
        given[-1].wait()
        return apply(update)

    trainer.pool.evaluate = remember  # type: ignore[assignment]
    trainer.pool.apply = late  # type: ignore[method-assign]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for stale in (False, True):
            found, share = accuracies(seed, arguments.steps, stale=stale)
            runs.append({"seed": seed, "stale_members": share, "accuracy": found})
            print(rounded(runs[-1]), flush=True)
    last = {
        name: [run["accuracy"][arguments.steps] for run in runs if bool(run["stale_members"]) == stale]
        for name, stale in (("up to date", False), ("stale", True))
    }
    result = {
        "settings": settings(arguments),
        "runs": rounded(runs),
        "accuracy_at_the_end": rounded({name: statistics.fmean(values) for name, values in last.items()}),
    }
    write_result("staleness", result, arguments.results)


if __name__ == "__main__":
    main()

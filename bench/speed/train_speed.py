"""Tokens a second of training, as a share of plain batched inference by the same engines; and where the rest goes.

    python -m bench.speed.train_speed [--steps 10] [key=value ...]

Training: real steps of `Trainer`, from the end of one to the end of the next: encoding, perturbing, generating,
grading, update, fingerprint, the journal's line on disk, metrics, completions as parquet, trackers. The first step,
which compiles and warms up, is left out; so are evaluations.

Plain inference: right after each step, its members complete its prompts once more, on the same replicas, all at once
and each one's share back to back. Only the time within the engine's `generate` counts, and each replica's rate for
itself: nothing perturbs, nobody waits. So both do the same work at nearly the same moment, and share the machine with
the same neighbours. The best step's rate is given beside the median.

The parts of a step, in seconds of wall time. What replicas do side by side is averaged over them.

- `generate, at the plain rate`: what plain inference would have taken for the step's tokens;
- `generate, slower than plain`: what generating took more, beside grading and messages;
- `perturb`;
- `wait for the last member`: replicas with no member left, while another still generates;
- `messages`: what else replicas wait for between two members;
- `grade the last member`: grading overlaps with generating, but for the member that finishes last;
- `update and fingerprint`, `journal`, and `all else`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result

from estune.config import load
from estune.es.strategy import Member
from estune.pool.base import Evaluated, Evaluator
from estune.run.held_out import token_ids
from estune.run.make import make_sampling
from estune.run.monitors.base import Metrics, Monitor, Sample
from estune.run.monitors.files import JsonlMonitor, TensorBoardMonitor
from estune.run.trainer import Trainer

Parts = dict[str, float]


class Stopwatch:
    """Measures one trainer from outside: what it calls is timed on the way."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        pool: Any = trainer.pool
        self.replicas = len(pool.replicas)
        self.seconds: Parts = {}
        self.evaluate = trainer.pool.evaluate
        pool.evaluate = self._evaluate
        trainer.pool.apply = self._timed("update and fingerprint", trainer.pool.apply)
        trainer.journal.append_step = self._timed("journal", trainer.journal.append_step)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[name] = time.perf_counter() - start

        return timing

    def _evaluate(self, *arguments: Any, **named: Any) -> Iterator[tuple[int, Evaluated]]:
        """What the pool yields, with notes of when members arrive and when the trainer wants the next."""
        start, arrivals, asked = time.perf_counter(), [], 0.0
        for found in self.evaluate(*arguments, **named):
            arrivals.append(time.perf_counter())
            yield found
            asked = time.perf_counter()
        # Whose member arrives among the last has none left.
        last = arrivals[-self.replicas :]
        self.seconds["evaluate"] = arrivals[-1] - start
        self.seconds["wait for the last member"] = sum(arrivals[-1] - t for t in last) / self.replicas
        self.seconds["grade the last member"] = asked - arrivals[-1]

    def parts(self, metrics: Metrics, wall: float) -> Parts:
        """The step that has just ended, by part; they add up to its wall time."""
        took = self.seconds
        perturb, generate = (metrics[f"time/{name}"] / self.replicas for name in ("perturb", "generate"))
        messages = took["evaluate"] - perturb - generate - took["wait for the last member"]
        named = ("wait for the last member", "grade the last member", "update and fingerprint", "journal")
        once = took["evaluate"] + sum(took[name] for name in named[1:])
        return {
            "generate": generate,
            "perturb": perturb,
            "messages": messages,
            **{name: took[name] for name in named},
            "all else": wall - once,
        }

    def plain(self, members: Sequence[Member], rows: Sequence[int]) -> float:
        """Tokens a second of all replicas together, each generating its share of the members back to back."""
        trainer = self.trainer
        prompts = token_ids(trainer.encoder, trainer.task, (trainer.task.train[i] for i in rows))
        sampling, sigma = make_sampling(trainer.config), trainer.strategy.sigma

        def rate(replica: Evaluator, share: Sequence[Member]) -> float:
            tokens, seconds = 0, 0.0
            for member in share:
                replica.take([member], sigma)
                start = time.perf_counter()
                (completions,) = replica.complete_each(prompts, sampling)
                seconds += time.perf_counter() - start
                tokens += sum(len(c.token_ids) for c in completions)
            return tokens / seconds

        shares = [members[i :: self.replicas] for i in range(self.replicas)]
        with ThreadPoolExecutor(self.replicas) as threads:
            pool: Any = trainer.pool
            return sum(threads.map(rate, pool.replicas, shares))


class Alternation(Monitor):
    """After each step, lets the same replicas do plain inference; keeps the figures of both."""

    def __init__(self) -> None:
        self.watch: Stopwatch | None = None
        self.steps: list[dict[str, Any]] = []
        self._tokens = self._began = 0.0

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        assert self.watch is not None
        wall = time.perf_counter() - self._began
        tokens, self._tokens = metrics["num_tokens"] - self._tokens, metrics["num_tokens"]
        record = self.watch.trainer.journal.steps[-1]
        parts = self.watch.parts(metrics, wall)
        plain = self.watch.plain(record.update.members, record.prompts)
        at_plain_rate = tokens / plain
        parts = {
            "generate, at the plain rate": at_plain_rate,
            "generate, slower than plain": parts.pop("generate") - at_plain_rate,
            **parts,
        }
        self.steps.append({"wall": wall, "tokens": tokens, "training": tokens / wall, "plain": plain, "parts": parts})
        print(f"step {metrics['step']}: training {tokens / wall:.0f}, plain {plain:.0f} tokens a second", flush=True)
        self._began = time.perf_counter()


def measure(steps: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Medians over all steps but the first."""
    fixed = [f"steps={steps + 1}", "eval_steps=0", f"output_dir={folder / 'run'}"]
    config = load(None, [*fixed, *overrides])
    monitor = Alternation()
    files = [JsonlMonitor(folder / "metrics.jsonl"), TensorBoardMonitor(folder / "tensorboard")]
    trainer = Trainer(config, monitors=[*files, monitor])
    monitor.watch = Stopwatch(trainer)
    trainer.train()

    taken = monitor.steps[1:]
    median = {name: statistics.median(s[name] for s in taken) for name in ("wall", "training", "plain")}
    parts = {name: statistics.median(s["parts"][name] for s in taken) for name in taken[0]["parts"]}
    shares = {name: statistics.median(100 * s["parts"][name] / s["wall"] for s in taken) for name in parts}
    return {
        "population": config.population,
        "prompts per step": config.prompts_per_step,
        "replicas and threads": [trainer.config.replicas, trainer.config.threads],
        "mean completion length": statistics.mean(s["tokens"] for s in taken)
        / (config.population * config.prompts_per_step),
        "tokens per second": {
            "training": median["training"],
            "plain inference": median["plain"],
            "plain inference, best": max(s["plain"] for s in taken),
        },
        "share of plain inference": statistics.median(s["training"] / s["plain"] for s in taken),
        "share of plain inference's best step": median["training"] / max(s["plain"] for s in taken),
        "share of plain inference, by step": [s["training"] / s["plain"] for s in taken],
        "seconds a step": median["wall"],
        "seconds by part": parts,
        "percent by part": shares,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="settings of the run, key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args.steps, Path(scratch), args.overrides)
    write_result("train_speed", {"settings": settings(args), **rounded(figures)}, args.results)


if __name__ == "__main__":
    main()

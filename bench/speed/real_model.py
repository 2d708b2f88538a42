"""A step of a small real model on this machine's CPU, in tokens a second, against plain inference of three kinds.

    python -m bench.speed.real_model [--model smollm2] [--steps 3] [--vllm PYTHON] [key=value ...]

A step is 16 members x 24 questions for capitals, in the model's chat template, of at most 48 tokens; all contestants
are given the same prompts. Only generated tokens count, a completion's end token included. All contestants take turns,
and medians are compared:

- training: whole steps of `Trainer` with its default dtype, replicas and threads, as `bench.speed.train_speed` measures
  them: perturb, generate, grade, restore, update, fingerprint, journal and all files;
- plain inference by the same engines, right after each step: its members complete its prompts once more, and only the
  time within `generate` counts;
- `generate` of transformers at its best, without any noise: float32 and bfloat16, 24 rows at a time and 48, by one
  process on all cores and by a process a core. Each is tried once, on two members' prompts, and the fastest takes part,
  with as many;
- vLLM at its best, without any noise, in eager mode, in an environment of its own (`--vllm`: its Python): float32 and
  bfloat16 tried once on one member's prompts; the faster is given all members' prompts at once. Its prefix cache is on:
  of the copies of a prompt it reads the beginning once, which steps could not;
- estune's steps with every other dtype, replicas and threads that a run could have here, in turns, with two members.

The learning rate is so small that all see the same model.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.contestants import Mode, Ours, PlainScript, tiny_coefficients
from bench.processes import Process
from bench.speed.train_speed import Alternation, Stopwatch
from bench.speed.vllm_plain import ANSWER

from estune.config import Config, load
from estune.pool.fastest import Way, ways
from estune.pool.open import available_cores
from estune.run.held_out import token_ids
from estune.run.monitors.base import Metrics, Sample
from estune.run.monitors.files import JsonlMonitor, TensorBoardMonitor
from estune.run.trainer import Trainer
from estune.weights.locate import locate

MEMBERS, PROMPTS, NEW_TOKENS = 16, 24, 48
FEW = 2  # members of what need not be a whole step
DTYPES = ("float32", "bfloat16")
BARS = {"plain inference": 0.95, "generate at its best": 8.0, "vLLM at its best": 1.3, "estune's best way": 0.9}
PATIENCE = 40.0  # seconds for a try: what takes longer is not the fastest

Taken = tuple[float, int]  # seconds, and tokens generated


class Generate:
    """`PlainScript`s side by side, each with its share of the prompts and of the cores."""

    def __init__(self, model: Path, prompts: Sequence[list[int]], dtype: str, processes: int) -> None:
        shares = [list(prompts[i::processes]) for i in range(processes)]
        self.rows = len(shares[0])
        self.threads = max(1, available_cores() // processes)
        self.scripts = [Process(PlainScript, model, share, NEW_TOKENS, dtype) for share in shares]

    def run(self, rows: int) -> Taken:
        """So many rows at a time."""
        mode = Mode(threads=self.threads, batches=max(1, self.rows // rows))
        start = time.perf_counter()
        for script in self.scripts:
            script.start(self.threads, "generate", mode)
        for script in self.scripts:
            script.wait(PATIENCE)
        seconds = time.perf_counter() - start
        return seconds, sum(script.call(1, "count")[0] for script in self.scripts)

    def close(self) -> None:
        for script in self.scripts:
            script.close()


class Vllm:
    """vLLM in its environment."""

    def __init__(self, python: Path, model: Path, dtype: str) -> None:
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        more["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{available_cores() - 1}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "bench.speed.vllm_plain", str(model), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | more,
        )
        self._answer()

    def run(self, prompts: Sequence[list[int]]) -> Taken:
        """All prompts at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}) + "\n")
        self.process.stdin.flush()
        found = self._answer()
        return found["seconds"], found["tokens"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        code = self.process.wait()
        self.log.seek(0)
        *_, why = filter(None, ["its log is empty", *map(str.strip, self.log)])
        raise RuntimeError(f"vLLM ended with code {code}: {why}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


class Turns(Alternation):
    """After each step, plain inference by the same engines, and then the others."""

    def __init__(self, others: dict[str, Any]) -> None:
        super().__init__()
        self.others = others
        self.taken: dict[str, list[Taken]] = {name: [] for name in others}

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        super().on_step_end(metrics, sample)
        for name, run in self.others.items() if len(self.steps) > 1 else ():  # the first step is left out
            self.taken[name].append(run())
            print(name, _speed(self.taken[name][-1]), flush=True)
        self._began = time.perf_counter()


def _speed(taken: Taken) -> str:
    return f"{taken[1] / taken[0]:.0f} tokens a second ({taken[1]} in {taken[0]:.1f} s)"


def best_generate(model: Path, prompts: Sequence[list[int]], keep: ExitStack) -> tuple[dict[str, float], str, Any]:
    """Tokens a second of each way to call `generate`, the name of the fastest, and what runs it."""
    found: dict[str, float] = {}
    best: tuple[float, str, Any] = (0.0, "", None)
    for dtype, processes in itertools.product(DTYPES, sorted({1, available_cores()})):
        script = keep.enter_context(closing(Generate(model, prompts, dtype, processes)))
        for rows in (PROMPTS, 2 * PROMPTS):
            if rows > script.rows:
                continue
            name = f"{dtype}, {processes} processes of {script.threads} threads, {rows} rows"
            try:
                seconds, tokens = script.run(rows)
            except TimeoutError:
                found[name] = 0.0
                script.close()  # it is still at it
                break
            found[name] = tokens / seconds
            print("generate,", name, _speed((seconds, tokens)), flush=True)
            best = max(best, (found[name], name, lambda script=script, rows=rows: script.run(rows)), key=lambda b: b[0])
    return found, best[1], best[2]


def best_vllm(
    python: Path, model: Path, prompts: Sequence[list[int]], keep: ExitStack
) -> tuple[dict[str, float], str, Any]:
    """As `best_generate`, of vLLM; it is given all members' prompts."""
    found: dict[str, float] = {}
    engines = {}
    for dtype in DTYPES:
        engines[dtype] = keep.enter_context(closing(Vllm(python, model, dtype)))
        engines[dtype].run(prompts[:2])
        seconds, tokens = engines[dtype].run(prompts)
        found[dtype] = tokens / seconds
        print("vLLM,", dtype, _speed((seconds, tokens)), flush=True)
    best = max(found, key=lambda dtype: found[dtype])
    for dtype, engine in engines.items():
        if dtype != best:
            engine.close()
    return found, best, lambda: engines[best].run(list(prompts) * MEMBERS)


def grid(config: Config, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """Tokens a second of steps in each way, in turns."""
    choices = ways(DTYPES, available_cores(), FEW, replicas=None, threads=None)
    taken: dict[Way, list[Taken]] = {way: [] for way in choices}
    with ExitStack() as keep:
        ours = {}
        for way in choices:
            told = {"dtype": way.dtype, "replicas": way.replicas, "threads": way.threads}
            settled = config.model_copy(update=told)
            ours[way] = keep.enter_context(closing(Process(Ours, settled, prompts, NEW_TOKENS)))
            ours[way].call(way.threads, "warm_up")
        for _ in range(repeats):
            for way, process in ours.items():
                seeds = list(range(FEW))
                parts, seconds = process.call(way.threads, "step", seeds, config.sigma, tiny_coefficients(seeds))
                taken[way].append((seconds, int(parts["tokens"])))
                print(way, _speed(taken[way][-1]), flush=True)
    return {str(way): _figures(found) for way, found in taken.items()}


def _figures(taken: Sequence[Taken]) -> dict[str, float]:
    return {
        "tokens per second": statistics.median(tokens / seconds for seconds, tokens in taken),
        "tokens": taken[0][1],
        "seconds": statistics.median(seconds for seconds, _ in taken),
    }


def measure(args: Any, folder: Path) -> dict[str, Any]:
    """Everything, in turns."""
    fixed = [f"model={args.model}", "task=examples/capitals.py", f"population={MEMBERS}", f"prompts_per_step={PROMPTS}"]
    fixed += [f"max_new_tokens={NEW_TOKENS}", "learning_rate=1e-9", "eval_steps=0", "eval_on_start=false"]
    config = load(None, [*fixed, f"steps={args.steps + 1}", f"output_dir={folder / 'run'}", *args.overrides])
    model = locate(config.model)
    monitors = [JsonlMonitor(folder / "metrics.jsonl"), TensorBoardMonitor(folder / "tensorboard")]
    trainer = Trainer(config, monitors=monitors)
    prompts = token_ids(trainer.encoder, trainer.task, (trainer.task.train[i] for i in trainer.order.rows(0)))
    ways_to: dict[str, Any] = {}
    with ExitStack() as keep:
        others = {}
        tried, name, run = best_generate(model, prompts * FEW, keep)
        ways_to["generate"] = {"tokens per second, tried once": tried, "chosen": name}
        others["generate at its best"] = run
        if args.vllm:
            tried, name, run = best_vllm(args.vllm, model, prompts, keep)
            ways_to["vLLM"] = {"tokens per second, tried once": tried, "chosen": name}
            others["vLLM at its best"] = run
        turns = Turns(others)
        turns.watch = Stopwatch(trainer)
        trainer.monitors.append(turns)
        trainer.train()
    steps = turns.steps[1:]
    settled = trainer.config
    found = {
        "training": _figures([(s["wall"], int(s["tokens"])) for s in steps]),
        "plain inference": _figures([(s["tokens"] / s["plain"], int(s["tokens"])) for s in steps]),
        **{name: _figures(taken) for name, taken in turns.taken.items()},
    }
    default = Way(trainer.trained.live_dtype, settled.replicas or 1, settled.threads or 1)
    each = grid(settled, prompts, args.steps)
    best = max(each, key=lambda way: each[way]["tokens per second"])
    training = found["training"]["tokens per second"]
    ratios = {
        "plain inference": statistics.median(s["training"] / s["plain"] for s in steps),
        **{name: training / found[name]["tokens per second"] for name in turns.taken},
        "estune's best way": each[str(default)]["tokens per second"] / each[best]["tokens per second"],
    }
    parts = {name: statistics.median(s["parts"][name] for s in steps) for name in steps[0]["parts"]}
    return {
        "prompt tokens": sum(map(len, prompts)),
        "contestants": found,
        "training, as a multiple": ratios,
        "bars": {name: BARS[name] for name in ratios},
        "reached": {name: ratio >= BARS[name] for name, ratio in ratios.items()},
        "seconds of a step by part": parts,
        "ways": {"default": str(default), "best": best, "each": each},
        "ways of others": ways_to,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM; without it, vLLM is left out")
    parser.add_argument("overrides", nargs="*", help="settings of the run, key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args, Path(scratch))
    write_result("real_model", {"settings": settings(args), **rounded(figures)}, args.results)


if __name__ == "__main__":
    main()

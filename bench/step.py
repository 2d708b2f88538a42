"""One step of evolution on the embedded model, ours against a plain script in the paper's manner.

    python -m bench.step [--model DIR] [--members 30] [--prompts 200] [--repeats 5]

Both do the same work: `members` times perturb all weights and complete `prompts` Countdown prompts greedily, then
update the weights from all members. Grading is left out of both. The plain script draws noise with `torch.randn`, adds
it, calls `generate` on one left-padded batch, and subtracts the noise again; it runs with one thread and with torch's
default, one per core, and the faster counts. Ours runs as `estune train` would: one engine per core, each with one
thread. All take turns, and medians are compared. On a busy machine threads that wait for one another make torch's
default very slow. The plain script has a process of its own, so that nothing that estune sets for its process helps it.

Before anything is timed, both complete the prompts with the same weights, base and perturbed, and must agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from bench.common import write_result
from bench.models import embedded_or_random
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from estune.config import Config
from estune.engines.base import Sampling
from estune.setup import open_pool
from estune.strategy import Member, Update
from estune.tasks.prompt import countdown_prompt


def draw_prompts(count: int) -> list[str]:
    """Countdown prompts in the paper's layout, as the embedded model knows them."""
    draw = random.Random(0)
    return [countdown_prompt([draw.randint(1, 9) for _ in range(3)], draw.randint(1, 60)) for _ in range(count)]


class PlainScript:
    """What one would write after reading the paper, in about the authors' words."""

    def __init__(self, model: Path, prompts: list[str], new_tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        self.settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    @torch.inference_mode()
    def generate(self) -> list[str]:
        tokens = self.model.generate(**self.inputs, generation_config=self.settings)
        completions = tokens[:, self.inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return texts

    def load(self, weights: dict[str, np.ndarray]) -> None:
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})

    @torch.inference_mode()
    def add_noise(self, seed: int, scale: float) -> None:
        generator = torch.Generator()
        for parameter in self.model.parameters():
            generator.manual_seed(seed)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    def step(self, seeds: list[int], sigma: float, coefficients: list[float]) -> list[list[str]]:
        completions = []
        for seed in seeds:
            self.add_noise(seed, sigma)
            completions.append(self.generate())
            self.add_noise(seed, -sigma)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            self.add_noise(seed, coefficient)
        return completions


class Ours:
    """The same step from estune's parts, as its trainer uses them."""

    def __init__(self, model: Path, prompts: list[str], new_tokens: int, replicas: int) -> None:
        config = Config(model=str(model), dtype="float32", replicas=replicas, threads=1)
        self.replica, self.pool = open_pool(config)
        self.ids = self.replica.engine.encode(prompts)
        self.sampling = Sampling(new_tokens)

    def step(self, seeds: list[int], sigma: float, coefficients: list[float]) -> dict[str, float]:
        members = tuple(Member(seed) for seed in seeds)
        found = [result for _, result in self.pool.evaluate(members, sigma, self.ids, self.sampling)]
        self.pool.apply(Update(0, members, tuple(coefficients)))
        return {
            "perturb": sum(e.perturb_time for e in found),
            "generate": sum(e.generate_time for e in found),
            "tokens": sum(len(c.token_ids) for e in found for c in e.completions),
        }

    def complete(self) -> list[str]:
        return [c.text for c in self.replica.engine.generate(self.ids, self.sampling)]


def serve(pipe: Connection, model: Path, prompts: list[str], new_tokens: int) -> None:
    """The plain script's process: runs what it is told, and answers with the result and its seconds."""
    plain = PlainScript(model, prompts, new_tokens)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        threads, call, *arguments = order
        torch.set_num_threads(threads)
        start = time.perf_counter()
        result = getattr(plain, call)(*arguments)
        pipe.send((result, time.perf_counter() - start))


def agreement(pipe: Connection, ours: Ours, sigma: float) -> dict[str, int]:
    """Completions that agree, with base weights and with those of a member, which the plain script is sent."""
    engine, weights = ours.replica.engine, ours.replica.weights
    agree = {}
    for name in ("perturbed", "base"):
        if name == "perturbed":
            weights.perturb(Member(123), sigma)
        else:
            weights.restore()
        pipe.send((1, "load", {n: t.numpy() for n, t in engine.model.state_dict().items()}))
        pipe.recv()
        pipe.send((1, "generate"))
        agree[name] = sum(a == b for a, b in zip(pipe.recv()[0], ours.complete(), strict=True))
    return agree


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded model)")
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--sigma", type=float, default=0.012)
    parser.add_argument("--repeats", type=int, default=5)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--plain-threads", nargs="+", type=int, default=sorted({1, cores}))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        model, what = embedded_or_random(args.model, Path(scratch))
        prompts = draw_prompts(args.prompts)
        spawn = multiprocessing.get_context("spawn")
        pipe, end = spawn.Pipe()
        script = spawn.Process(target=serve, args=(end, model, prompts, args.new_tokens), daemon=True)
        script.start()
        ours = Ours(model, prompts, args.new_tokens, cores)
        pipe.recv()
    torch.set_num_threads(1)
    agree = agreement(pipe, ours, args.sigma)
    print(f"{what}; completions that agree, of {args.prompts}: {agree}")

    # Noise as large as training's, coefficients so small that all repeats see the same model.
    seeds = list(range(args.members))
    coefficients = [1e-9 * (-1) ** i for i in seeds]
    ways = {f"plain, {threads} threads": threads for threads in args.plain_threads}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "ours")}
    parts: list[dict[str, float]] = []
    for repeat in range(args.repeats + 1):
        few = args.members if repeat else 2  # the first repeat warms up
        for name, threads in ways.items():
            pipe.send((threads, "step", seeds[:few], args.sigma, coefficients[:few]))
            seconds[name].append(pipe.recv()[1])
        start = time.perf_counter()
        parts.append(ours.step(seeds[:few], args.sigma, coefficients[:few]))
        seconds["ours"].append(time.perf_counter() - start)
        print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    pipe.send(None)
    script.join()
    ours.pool.close()
    seconds = {name: values[1:] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(median[name] for name in ways)
    write_result(
        "step",
        {
            "model": what,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "ours_threads": f"{cores} replicas of 1",
            "agree": agree,
            "median_seconds": median,
            "seconds": seconds,
            "ratio": best / median["ours"],
            "ours_tokens_per_second": parts[-1]["tokens"] / median["ours"],
            "ours_perturb_share": parts[-1]["perturb"] / (parts[-1]["perturb"] + parts[-1]["generate"]),
        },
    )


if __name__ == "__main__":
    main()

"""How long a server takes to serve another step of a run, against its memory's bandwidth and the update's kernel.

    python -m bench.speed.swap [--model DIR] [--members 30] [--steps 3] [--repeats 3]

In an environment that has vLLM. A run of random seeds over the model, as nothing here depends on what was learnt. Three
kinds of swap, each by HTTP to `vllm serve`: a step further on the same run, back to weights that are still in memory,
and to another run, rebuilt from the base model's files. Beside them: the update's kernel alone on as many weights, and
a copy of as many bytes as the kept base has.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench.common import options, rounded, settings, write_result
from tests.servers import serve_vllm

from estune.es.strategy import Member, Update
from estune.pool.deadlines import Deadlines
from estune.pool.remote.handle import RemoteHandle
from estune.pool.remote.pool import new_lease
from estune.pool.remote.wire import Swapped, Terms
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate
from estune.weights.weights import Weights


def update(seed: int, step: int, members: int) -> Update:
    return Update(step, tuple(Member(seed + step * members + i) for i in range(members)), (1e-6,) * members)


def kernel(elements: int, members: int) -> dict[str, float]:
    """Seconds of one update of so many float32 weights, and of a copy of their base, on one thread."""
    weights = Weights.of(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(elements), requires_grad=False)}))
    taken = []
    for step in range(3):
        began = time.perf_counter()
        weights.apply(update(1, step, members))
        taken.append(time.perf_counter() - began)
    source = torch.zeros(elements)
    target = torch.ones(elements)
    copied = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        copied.append(time.perf_counter() - began)
    return {"update": statistics.median(taken), "copy": statistics.median(copied)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each kind of swap in turns."""
    torch.set_num_threads(1)
    model = locate(args.model)
    checkpoint = Checkpoint(model)
    elements = sum(t.elements for t in checkpoint.tensors.values())
    server = serve_vllm(model, Path(tempfile.mkdtemp()), "--max-model-len", "256", dtype="bfloat16")
    try:
        server.wait()
        handle = RemoteHandle(
            0, server.url, None, Terms(new_lease(), "master", "nearest", "iid", "*"), {}, None, Deadlines(None)
        )
        began = time.perf_counter()
        handle.open()
        opening = time.perf_counter() - began
        runs = {seed: [update(seed, step, args.members) for step in range(args.steps)] for seed in (10**6, 10**9)}
        prints = {
            seed: [handle.call("rebuild", run[: n + 1], None) for n in range(args.steps)] for seed, run in runs.items()
        }

        def swap(seed: int, steps: int) -> tuple[Swapped, float]:
            began = time.perf_counter()
            found = handle.call("swap", runs[seed][:steps], prints[seed][steps - 1], 2)
            return found, time.perf_counter() - began

        seconds: dict[str, list[float]] = {"kept": [], "advanced": [], "rebuilt": []}
        one, other = runs
        for _ in range(args.repeats):
            for seed, steps in ((one, args.steps - 1), (one, args.steps), (one, args.steps - 1), (other, args.steps)):
                found, taken = swap(seed, steps)
                seconds[found.how].append(taken)
        handle.end()
    finally:
        server.kill()
    alone = kernel(elements, args.members)
    medians = {how: statistics.median(taken) for how, taken in seconds.items()}
    return {
        "weights": elements,
        "seconds to open, checks included": opening,
        "seconds": medians,
        "alone": alone,
        "a step further, over the kernel": medians["advanced"] / alone["update"],
        "kept, over three copies": medians["kept"] / (3 * alone["copy"]),
        "gigabytes a second of the copy": elements * 8 / alone["copy"] / 1e9,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    write_result("swap", {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

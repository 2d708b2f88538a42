"""What training an adapter takes against training all weights: memory of one engine, and the time of a member's parts.

    python -m bench.memory.adapter [--models smollm2 tiny] [--dtypes float32 bfloat16] [--rank 8] [--prompts 24] [--new
        32] [--repeats 5]

Each way is a process of its own, with one engine and its base: the way's memory is the most that the process has held
(of mapped files what it has touched counts too). Both take turns: perturb, then complete some prompts, then update by
ten members. All matrices of the layers get an adapter. Sigma is so small that both ways give the same completions, as
their time is compared.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from typing import Any

import psutil
from bench.common import options, rounded, settings, write_result
from bench.models import countdown_prompts
from bench.processes import Process

MEMBERS = 10
SIGMA = 1e-7


class Way:
    """One engine that trains all weights, or an adapter."""

    def __init__(self, model: str, dtype: str, rank: int | None, threads: int, prompts: int, new: int) -> None:
        from estune.config import Config
        from estune.pool.replica import Replica
        from estune.weights.adapters import Adapter

        adapter = None if rank is None else Adapter(rank=rank)
        config = Config(model=model, dtype=dtype, device="cpu", engine="transformers", threads=threads, adapter=adapter)
        self._replica = Replica(config)
        self._seeds = itertools.count()
        self._ids = countdown_prompts(prompts, model)
        self._new = new
        self._tokens = 0

    def describe(self) -> dict[str, Any]:
        engine: Any = self._replica.engine
        decoder = type(engine.decoder).__name__
        return {"elements": self._replica.weights.elements, "decoder": decoder, "tokens": self._tokens}

    def turn(self) -> dict[str, float]:
        """Seconds of each part."""
        from estune.completion import Sampling
        from estune.es.strategy import Member, Update

        begun = [time.perf_counter()]
        self._replica.perturb(Member(next(self._seeds)), SIGMA)
        begun.append(time.perf_counter())
        found = self._replica.complete(self._ids, Sampling(self._new))
        begun.append(time.perf_counter())
        self._tokens = sum(len(completion.token_ids) for completion in found)
        members = tuple(Member(next(self._seeds)) for _ in range(MEMBERS))
        self._replica.apply(Update(0, members, (SIGMA,) * MEMBERS, 0.0, 1))
        begun.append(time.perf_counter())
        return dict(zip(("perturb", "generate", "update"), (b - a for a, b in itertools.pairwise(begun)), strict=True))

    def memory(self) -> dict[str, float]:
        """GB of the process: the most so far, and now."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak memory, GB": peak / 1e9, "memory at the end, GB": psutil.Process().memory_info().rss / 1e9}


def measure(model: str, dtype: str, rank: int, threads: int, repeats: int, prompts: int, new: int) -> dict[str, Any]:
    ways = {
        "all weights": Process(Way, model, dtype, None, threads, prompts, new),
        "adapter": Process(Way, model, dtype, rank, threads, prompts, new),
    }
    found: dict[str, Any] = {}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            turn, _ = way.call(threads, "turn")
            turns[name] += [turn] * (number > 0)  # the first compiles
    for name, way in ways.items():
        parts = {f"{part}, s": statistics.median(t[part] for t in turns[name]) for part in turns[name][0]}
        described, _ = way.call(threads, "describe")
        memory, _ = way.call(threads, "memory")
        found[name] = {**described, **parts, **memory}
        way.close()
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sizes = arguments.rank, arguments.threads, arguments.repeats, arguments.prompts, arguments.new
    result = {
        f"{model}, {dtype}": measure(model, dtype, *sizes) for model in arguments.models for dtype in arguments.dtypes
    }
    write_result("adapter", {"settings": settings(arguments), **rounded(result)}, arguments.results)


if __name__ == "__main__":
    main()

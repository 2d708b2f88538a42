"""What each way to keep the base beside live weights in bfloat16 takes: memory of one engine, and the time of passes.

    python -m bench.memory.kept [--model smollm2] [--sigma 0.001] [--repeats 5]

Each way is a process of its own, with one engine and what it keeps; they take turns: perturb from rest, complete a few
prompts, go to another member, restore, update by ten members, fingerprint. Memory is the most that the process has
held, loading included, and what it holds at the end; of mapped files what it has touched counts too. Patches are told
in bytes for each byte of the live weights, after updates, when the lower halves of float32 weights are any bits.
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
POLICIES = ("master", "split_master", "copy", "exact_inplace")
SMALL = 1e-5  # coefficients of updates


class Way:
    """One engine with its weights."""

    def __init__(self, model: str, policy: Any, sigma: float, threads: int, prompts: int, new: int) -> None:
        from estune.config import Config
        from estune.pool.replica import Replica

        config = Config(
            model=model,
            weights=policy,
            dtype="bfloat16",
            rounding="nearest",
            device="cpu",
            engine="transformers",
            threads=threads,
        )
        self._replica = Replica(config)
        self._seeds = itertools.count()
        self._ids = countdown_prompts(prompts, model)
        self._new = new
        self._sigma = sigma

    def turn(self) -> dict[str, float]:
        """Seconds of each part."""
        from estune.completion import Sampling
        from estune.es.strategy import Member, Update

        replica = self._replica
        members = tuple(Member(next(self._seeds)) for _ in range(MEMBERS))
        parts: dict[str, Any] = {
            "perturb": lambda: replica.perturb(members[0], self._sigma),
            "generate": lambda: replica.complete(self._ids, Sampling(self._new)),
            "member to member": lambda: replica.perturb(members[1], self._sigma),
            "restore": replica.weights.restore,
            "update": lambda: replica.apply(Update(0, members, (SMALL,) * MEMBERS, 0.0, 1)),
            "fingerprint": replica.weights.fingerprint,
        }
        found = {}
        for name, work in parts.items():
            begun = time.perf_counter()
            work()
            found[name] = time.perf_counter() - begun
        return found

    def describe(self) -> dict[str, Any]:
        """Memory, patches, and the fingerprint."""
        weights: Any = self._replica.weights
        live = sum(p.tensor.nbytes for p in weights.parameters)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "peak memory, GB": peak / 1e9,
            "memory at the end, GB": psutil.Process().memory_info().rss / 1e9,
            "live weights, GB": live / 1e9,
            "patches / weights": weights.storage.patch_bytes / live,
            "fingerprint": weights.fingerprint(),
        }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sigma", type=float, default=0.001)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sizes = args.sigma, args.threads, args.prompts, args.new
    ways = {policy: Process(Way, args.model, policy, *sizes) for policy in POLICIES}
    turns: dict[str, list[dict[str, float]]] = {policy: [] for policy in ways}
    for number in range(args.repeats + 1):
        for policy, way in ways.items():
            turn, _ = way.call(args.threads, "turn")
            turns[policy] += [turn] * (number > 0)  # the first compiles
    found: dict[str, Any] = {}
    for policy, way in ways.items():
        parts = {f"{part}, s": statistics.median(t[part] for t in turns[policy]) for part in turns[policy][0]}
        described, _ = way.call(args.threads, "describe")
        found[policy] = {**parts, **described}
        way.close()
    assert found["master"]["fingerprint"] == found["split_master"]["fingerprint"]
    write_result("kept", {"settings": settings(args), **rounded(found)}, args.results)


if __name__ == "__main__":
    main()

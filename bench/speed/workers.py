"""What a second worker brings, and what goes over the wire.

    python -m bench.speed.workers [--members 30] [--prompts 200] [--repeats 5]

One worker of one thread against two, with the embedded model: seconds of a step's members, the two in turns, medians.
The bytes are those of what is sent, pickled, prompts and completions aside; `bench.faults.two_hosts` counts them on a
wire.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
from typing import Any

from bench.common import in_turns, options, rounded, settings, write_result
from bench.models import countdown_prompts

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.es.strategy import Member, Update
from estune.pool.base import Evaluated
from estune.pool.ray.cluster import connect, disconnect
from estune.pool.ray.pool import RayPool

SIGMA, NEW_TOKENS = 0.012, 40


def wire(population: int, prompts: int) -> dict[str, int]:
    """Bytes of what a member and a step cost beside text."""
    sampling = Sampling(NEW_TOKENS)
    members = tuple(Member(2**64 - 1 - i) for i in range(population))
    reference = bytes(28)  # an id of Ray's, in place of the prompts
    asked = pickle.dumps((1000, members[0], SIGMA, reference, sampling), 5)
    result = pickle.dumps(Evaluated([Completion("", [], True)] * prompts, 0.123, 4.567), 5)
    return {
        "a member, there": len(asked),
        "a member, back": len(result),
        "an update": len(pickle.dumps((1000, Update(1000, members, (1.1e-5,) * population)), 5)),
        "members of an update": population,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both pools on one cluster, in turns."""
    prompts = countdown_prompts(args.prompts)
    members = [Member(seed) for seed in range(args.members)]
    config = Config(device="cpu", threads=1, workers=3)
    connect(config)
    pools = {n: RayPool(config.model_copy(update={"workers": n})) for n in (1, 2)}
    try:
        for n, pool in pools.items():
            pool.wait_for_workers(300)
            assert len(pool.crew.ready()) == n
        work = {
            n: lambda pool=pool: list(pool.evaluate(members, SIGMA, prompts, Sampling(NEW_TOKENS)))
            for n, pool in pools.items()
        }
        seconds = in_turns(work, args.repeats)
    finally:
        for pool in pools.values():
            pool.crew.close()
        disconnect()
    one, two = (statistics.median(seconds[n]) for n in (1, 2))  # type: ignore[index]
    ratios = [a / b for a, b in zip(seconds[1], seconds[2], strict=True)]  # type: ignore[index]
    return {
        "seconds": {"1 worker": one, "2 workers": two},
        "ratio": one / two,
        "ratio of each turn": ratios,
        "bytes": wire(30, args.prompts),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    write_result("workers", {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

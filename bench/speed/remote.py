"""A vLLM server as a worker over HTTP beside a Ray worker with vLLM: tokens a second, and bytes on the wire.

    python -m bench.speed.remote [--model tiny] [--members 4] [--prompts 200] [--new-tokens 40] [--repeats 5]

In an environment that has vLLM and Ray. Both have the same weights, type and prompts, and are given the same members in
turns, one worker of one thread each, on the same cores. What passes outside a worker's own work (perturbing and
generating) is told beside: the way there and back. Bytes are counted by a proxy between the run and the server, headers
included, once with text and once for no prompt and one token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import in_turns, options, rounded, settings, write_result
from bench.models import countdown_prompts
from bench.wire import Proxy
from tests.servers import serve_vllm

from estune.completion import Sampling
from estune.config import Config
from estune.es.strategy import Member, Update
from estune.pool.crewed import CrewPool
from estune.pool.ray.cluster import connect, disconnect
from estune.pool.ray.pool import RayPool
from estune.pool.remote.pool import RemotePool
from estune.weights.locate import locate

SIGMA = 0.012
BAR = 0.9  # of a Ray worker's tokens a second
BYTES = 2048  # a member, text aside


def tokens(pool: CrewPool, members: list[Member], prompts: list[list[int]], sampling: Sampling) -> int:
    """Evaluate members; the tokens they wrote."""
    return work(pool, members, prompts, sampling)[0]


def work(pool: CrewPool, members: list[Member], prompts: list[list[int]], sampling: Sampling) -> tuple[int, float]:
    """Evaluate members; the tokens they wrote, and the seconds that passed outside the worker's own work."""
    began = time.perf_counter()
    found = [done for _, done in pool.evaluate(members, SIGMA, prompts, sampling)]
    passed = time.perf_counter() - began
    count = sum(len(c.token_ids) for done in found for c in done.completions)
    return count, passed - sum(done.perturb_time + done.generate_time for done in found)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both workers in turns."""
    model = locate(args.model)
    prompts = countdown_prompts(args.prompts)
    sampling = Sampling(args.new_tokens, temperature=args.temperature)
    members = [Member(seed) for seed in range(args.members)]
    length = max(map(len, prompts)) + args.new_tokens + 1
    common = {"model": str(model), "engine": "vllm", "dtype": args.dtype, "vllm_max_model_length": 512}
    config = Config(**common, max_new_tokens=args.new_tokens, population=max(2, args.members))
    folder = Path(tempfile.mkdtemp())
    server = serve_vllm(model, folder, "--max-model-len", "512", dtype=args.dtype)
    assert length <= 512
    pools: dict[str, CrewPool] = {}
    try:
        server.wait()
        with Proxy(server.url) as proxy:
            near = Config.model_validate({**config.model_dump(), "workers": 1, "device": "cpu", "threads": 1})
            connect(near)
            pools["Ray"] = RayPool(near)
            pools["HTTP"] = RemotePool(config.model_copy(update={"workers_at": [proxy.url]}))
            for pool in pools.values():
                pool.wait_for_workers(300)
            one, other = (pool.evaluate(members[:1], SIGMA, prompts, sampling) for pool in pools.values())
            same = next(one)[1].completions == next(other)[1].completions
            outside: dict[str, list[float]] = {name: [] for name in pools}

            def turn(name: str) -> None:
                outside[name].append(work(pools[name], members, prompts, sampling)[1])

            seconds = in_turns({name: lambda name=name: turn(name) for name in pools}, args.repeats, 1)
            count = tokens(pools["HTTP"], members, prompts, sampling)
            before = proxy.bytes
            tokens(pools["HTTP"], members, prompts, sampling)
            whole = (proxy.bytes - before) / len(members)
            tokens(pools["HTTP"], members, [[1]], Sampling(1))
            before = proxy.bytes
            tokens(pools["HTTP"], members, [[1]], Sampling(1))
            bare = (proxy.bytes - before) / len(members)
            before = proxy.bytes
            thirty = tuple(Member(2**64 - 1 - i) for i in range(30))
            pools["HTTP"].apply(Update(0, thirty, (1.1e-5,) * 30))
            update = proxy.bytes - before
    finally:
        for pool in pools.values():
            pool.crew.close()
        disconnect()
        server.kill()
    speed = {name: count / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["Ray"], seconds["HTTP"], strict=True)]
    return {
        "tokens a second": speed,
        "of a Ray worker's": statistics.median(ratios),
        "of each turn": ratios,
        "seconds a member outside the worker's own work": {
            name: statistics.median(each) / len(members) for name, each in outside.items()
        },
        "above the bar": statistics.median(ratios) >= BAR,
        "the same completions": same,
        "bytes a member, completions as ids included": whole,
        "bytes a member, text aside": bare,
        "under the bar": bare < BYTES,
        "bytes of an update of 30 members": update,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = "remote" if args.model == "tiny" else f"remote-{Path(args.model).name}"
    write_result(name, {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

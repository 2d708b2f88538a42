"""What of a step with vLLM is not generation: perturbing, forgetting the prefix cache, and the update.

    python -m bench.speed.vllm_step [--members 8] [--prompts 200] [--new-tokens 40] [--repeats 5]

Of the embedded model with the Countdown task, in an environment that has vLLM. The bar: under 5% of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from bench.common import options, rounded, settings, write_result
from bench.models import countdown_prompts

from estune.completion import Sampling
from estune.config import Config
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.internals import check_version
from estune.engines.vllm.open import open_vllm
from estune.engines.vllm.weights import VllmWeights
from estune.es.evolution import EvolutionStrategy
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate

SIGMA, BAR = 0.012, 0.05


def step(
    engine: VllmEngine, weights: VllmWeights, strategy: EvolutionStrategy, prompts: list[list[int]], new: int
) -> dict[str, float]:
    """Seconds of each part of one step, with rewards that are not equal."""
    seconds = {"perturb": 0.0, "generate": 0.0, "update": 0.0}
    members = strategy.ask()
    for member in members:
        start = time.perf_counter()
        weights.perturb(member, strategy.sigma)
        perturbed = time.perf_counter()
        engine.generate(prompts, Sampling(new))
        seconds["perturb"] += perturbed - start
        seconds["generate"] += time.perf_counter() - perturbed
    start = time.perf_counter()
    weights.apply(strategy.tell([float(i) for i in range(len(members))]))
    weights.share_sum()
    seconds["update"] = time.perf_counter() - start
    return seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats."""
    torch.set_num_threads(1)
    config = Config(engine="vllm", population=args.members)
    started = time.perf_counter()
    engine, weights = open_vllm(Checkpoint(locate(config.model)), config)
    assert weights is not None
    opening = time.perf_counter() - started
    strategy = EvolutionStrategy(population=args.members, sigma=SIGMA, learning_rate=0.0)
    prompts = countdown_prompts(args.prompts)
    step(engine, weights, strategy, prompts, args.new_tokens)
    taken = [step(engine, weights, strategy, prompts, args.new_tokens) for _ in range(args.repeats)]
    engine.close()
    found = {part: statistics.median(one[part] for one in taken) for part in taken[0]}
    shares = [1 - one["generate"] / sum(one.values()) for one in taken]
    return {
        "vllm": check_version(),
        "seconds to open": opening,
        "seconds": found,
        "share outside generation": statistics.median(shares),
        "under the bar": statistics.median(shares) < BAR,
    }


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    write_result("vllm-step", rounded({"settings": settings(args), **measure(args)}), args.results)


if __name__ == "__main__":
    main()

"""What exact restoring in place costs: memory beside the weights, time against a copy, and what updates round away.

    python -m bench.exactness.in_place [--models smollm2 25M] [--threads 2] [--repeats 7] [--cycles 10000]

- Memory: bytes of patches for each byte of weights, the most of five members, by type and sigma; of a model and of
  random weights with a spread of 0.02. The bar is a fifth. All tensors of a model are taken.
- Time: `copy` and `exact_inplace` in turns, each perturbing and restoring in bfloat16, medians, and of each turn what
  the one takes over what the other takes. From member to member a copy restores nothing. Restoring in place draws the
  noise again; drawing alone is timed beside them, and two draws are the least that a member can take.
- Exactness: a small model perturbed by many members, one after the other, against its bits before.
- Updates: how much of 100 updates arrives in bfloat16 weights of a spread of 0.02, by the rounding. `gain` is the
  share of the sum of the updates, as float32 weights take it, that the weights have moved along; `off` is the size of
  the rest against that sum. Steps in random directions, and in one direction all the time.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from bench.common import in_turns, options, rounded, settings, write_result
from bench.models import SHAPES, random_model
from transformers import AutoModelForCausalLM

from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Member, Update
from estune.noise.cpu import perturb
from estune.weights.locate import locate
from estune.weights.parameters import Parameter, own_parameters
from estune.weights.policies import PolicyName, Rounding
from estune.weights.weights import Weights

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")
SIGMAS = (0.0005, 0.001, 0.004)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPREAD, ELEMENTS, POPULATION = 0.02, 1 << 17, 30
STRETCH = 1 << 18  # elements drawn at a time, which fit the second-level cache


def load(name: str, dtype: torch.dtype) -> list[Parameter]:
    """A model's parameters in a type."""
    if name in SHAPES:
        return own_parameters(random_model(name, SPREAD, dtype=dtype))
    return own_parameters(AutoModelForCausalLM.from_pretrained(locate(name), dtype=dtype).requires_grad_(False))


def memory(parameters: list[Parameter], sigma: float, threads: int) -> float:
    """Bytes of patches for each byte of weights."""
    weights = Weights(parameters, policy="exact_inplace", threads=threads)
    for seed in range(5):
        weights.perturb(Member(seed), sigma)
    weights.restore()
    return weights.storage.patch_bytes / sum(p.tensor.nbytes for p in parameters)


def times(model: str, threads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the passes of both policies, and how many times the copy's the other's are."""
    work: dict[str, Any] = {}
    for policy in ("copy", "exact_inplace"):
        weights = Weights(load(model, torch.bfloat16), policy=policy, threads=threads)  # type: ignore[arg-type]
        seeds = itertools.count()
        work[f"{policy}: perturb"] = lambda weights=weights, seeds=seeds: weights.perturb(Member(next(seeds)), 0.001)
        work[f"{policy}: restore"] = weights.restore
    drawn = weights.parameters
    work["draw"] = lambda: draw(drawn, threads)
    found = in_turns(work, repeats)
    turns = [dict(zip(found, seconds, strict=True)) for seconds in zip(*found.values(), strict=True)]

    def ratio(base: Sequence[str]) -> float:
        """Of perturbing and restoring in place, to passes of the copy."""
        return statistics.median(
            (turn["exact_inplace: perturb"] + turn["exact_inplace: restore"])
            / sum(turn[f"copy: {name}"] for name in base)
            for turn in turns
        )

    two_draws = statistics.median(2 * turn["draw"] / turn["copy: perturb"] for turn in turns)

    return {
        **{f"{name}, ms": 1e3 * statistics.median(seconds) for name, seconds in found.items()},
        "perturb and restore, times the copy's": ratio(("perturb", "restore")),
        "member to member, times the copy's": ratio(("perturb",)),
        "two draws, times the copy's from member to member": two_draws,
    }


def draw(parameters: Sequence[Parameter], threads: int) -> None:
    """Draw a member's noise, and add it to a few weights, which never leave the cache."""
    stretches = [
        (index, start, min(STRETCH, parameter.tensor.numel() - start))
        for index, parameter in enumerate(parameters)
        for start in range(0, parameter.tensor.numel(), STRETCH)
    ]
    live, base = np.zeros((2, STRETCH), np.uint16)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda s: perturb(live[: s[2]], base[: s[2]], 0, s[0], s[1], 0.001), stretches):
            pass


def cycles(count: int, dtype: torch.dtype) -> int:
    """Weights that are not what they were, after so many members one after the other, each restored to the bit."""
    parameters = load("1M", dtype)
    before = [p.tensor.clone() for p in parameters]
    weights = Weights(parameters, policy="exact_inplace")
    for seed in range(count):
        weights.perturb(Member(seed, 1 if seed % 3 else -1), 0.004)
        weights.restore()
    pairs = zip(parameters, before, strict=True)
    return sum(int((p.tensor.view(torch.uint8) != old.view(torch.uint8)).sum()) for p, old in pairs)


def arrives(rounding: Rounding, rate: float, *, same: bool) -> dict[str, float]:
    """What of 100 updates, of a learning rate given in the paper's, arrives in bfloat16 weights."""

    def moved(policy: PolicyName, how: Rounding) -> torch.Tensor:
        weights = Weights([Parameter("weight", drawn.clone())], policy=policy, rounding=how)
        for step, update in enumerate(updates):
            weights.apply(Update(step, update.members, update.coefficients, rounding_seed=step))
        base = torch.from_numpy(weights.base["weight"])
        return (base if base.dtype == torch.float32 else base.view(torch.bfloat16)).double() - drawn.double()

    drawn = (torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)) * SPREAD).bfloat16()
    strategy = EvolutionStrategy(population=POPULATION, sigma=0.001, learning_rate=0.0005 * rate)
    updates = [strategy.tell([float(i) for i in range(POPULATION)]) for _ in range(100)]
    updates = [updates[0]] * 100 if same else updates
    sum_ = moved("master", "nearest")
    found = moved("exact_inplace", rounding)
    return {
        "gain": float(found @ sum_ / (sum_ @ sum_)),
        "off": float((found - sum_).norm() / sum_.norm()),
    }


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2", "25M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=10_000)
    args = parser.parse_args()
    figures: dict[str, Any] = {"settings": settings(args)}
    for model in args.models:
        shares: dict[str, float] = {}
        for dtype, sigma in itertools.product(DTYPES, SIGMAS):
            shares[f"{str(dtype).removeprefix('torch.')}, sigma {sigma}"] = memory(
                load(model, dtype), sigma, args.threads
            )
        figures[model] = {"patches / weights": shares, "bfloat16": times(model, args.threads, args.repeats)}
    figures["weights changed by perturbing and restoring"] = {
        f"{args.cycles} times, {str(dtype).removeprefix('torch.')}": cycles(args.cycles, dtype) for dtype in DTYPES
    }
    figures["100 updates"] = {
        f"{'one direction' if same else 'random directions'}, learning rate x {rate}, {rounding}": arrives(
            rounding, rate, same=same
        )
        for same, rate, rounding in itertools.product((False, True), (1, 0.1), ROUNDINGS)
    }
    write_result("in-place", rounded(figures), args.results)


if __name__ == "__main__":
    main()

"""How fast weights are perturbed and updated: estune's fused kernels against torch's generator.

    python -m bench.noise

One thread throughout, except where two are named. Three ways to make `weights + sigma * noise` from a seed:

- `estune`: one fused pass, `live = base + sigma * noise`, which leaves the base as it was;
- `randn`: `weights.add_(torch.randn(n, generator=g), alpha=sigma)`, as ES scripts do it;
- `normal_`: the same with the noise drawn into a buffer that is kept.

All are timed in turns, and each figure is the median over the repeats.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from bench.common import medians, write_result

from estune.checkpoint import RUN_LENGTH
from estune.noise import cpu
from estune.weights import as_array

SIZES = {"256 K elements": 1 << 18, "1 M elements": 1 << 20, "16 M elements": 1 << 24}
MEMBERS = 30
TENSOR = 0x0123456789ABCDEF
SIGMA = 0.001


def compare(size: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Million elements a second of each way, for tensors of `size` elements."""
    base = torch.randn(size).to(dtype)
    live, buffer = base.clone(), torch.empty(size, dtype=dtype)
    base_array, live_array = as_array(base), as_array(live)
    generator = torch.Generator()
    calls = max(1, (1 << 22) // size)  # so that small tensors are timed over as many elements

    def fused() -> None:
        for call in range(calls):
            for start in range(0, size, RUN_LENGTH):
                run = slice(start, start + RUN_LENGTH)
                cpu.perturb(live_array[run], base_array[run], call, TENSOR, start, SIGMA)

    def randn() -> None:
        for call in range(calls):
            generator.manual_seed(call)
            live.add_(torch.randn(size, generator=generator, dtype=dtype), alpha=SIGMA)

    def normal() -> None:
        for call in range(calls):
            generator.manual_seed(call)
            live.add_(buffer.normal_(generator=generator), alpha=SIGMA)

    seconds = medians({"estune": fused, "randn": randn, "normal_": normal}, repeats)
    return _rates(seconds, size * calls)


def update(size: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Million element-members a second of an update by 30 members."""
    base = torch.randn(size).to(dtype)
    array, generator = as_array(base), torch.Generator()
    seeds = np.arange(MEMBERS, dtype=np.uint64)
    coefficients = np.full(MEMBERS, 1e-6, np.float32)

    def fused() -> None:
        for start in range(0, size, RUN_LENGTH):
            cpu.update(array[start : start + RUN_LENGTH], seeds, coefficients, TENSOR, start)

    def randn() -> None:
        for seed in range(MEMBERS):
            generator.manual_seed(seed)
            base.add_(torch.randn(size, generator=generator, dtype=dtype), alpha=1e-6)

    return _rates(medians({"estune": fused, "randn": randn}, repeats, warm_up=1), size * MEMBERS)


def two_threads(size: int, repeats: int) -> dict[str, float]:
    """Million elements a second of two Python threads at once, and of one: kernels release the interpreter."""
    base = as_array(torch.randn(size))
    live = base.copy()
    starts = list(range(0, size, RUN_LENGTH))

    def perturb(start: int) -> None:
        run = slice(start, start + RUN_LENGTH)
        cpu.perturb(live[run], base[run], 1, TENSOR, start, SIGMA)

    with ThreadPoolExecutor(2) as threads:
        work: dict[str, Any] = {
            "two threads": lambda: list(threads.map(perturb, starts)),
            "one thread": lambda: list(map(perturb, starts)),
        }
        return _rates(medians(work, repeats), size)


def _rates(seconds: dict[str, float], elements: int) -> dict[str, float]:
    rates = {name: round(elements / value / 1e6, 1) for name, value in seconds.items()}
    first, *others = rates
    ratios = {f"{first} / {other}": round(rates[first] / rates[other], 2) for other in others}
    return rates | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure noise kernels.")
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"unit": "million elements a second", "repeats": repeats}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for label, size in SIZES.items():
            figures[f"perturb, {name}, {label}"] = compare(size, dtype, repeats)
        figures[f"update per member, {name}, 1 M elements"] = update(1 << 20, dtype, max(3, repeats // 3))
    figures["perturb, float32, threads"] = two_threads(1 << 24, repeats)
    write_result("noise", figures)


if __name__ == "__main__":
    main()

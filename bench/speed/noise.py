"""How fast weights are perturbed and updated: estune's fused kernels against torch's generator.

    python -m bench.speed.noise

One thread throughout, except where two are named. Ways to make `weights + sigma * noise` from a seed:

- `estune`: one fused pass, `live = base + sigma * noise`, which leaves the base as it was;
- `randn`: `weights.add_(torch.randn(n, generator=g), alpha=sigma)`, as ES scripts do it;
- `randn, out`: the same with the noise drawn into a buffer that is kept;
- `normal_`: into that buffer with `normal_`;
- `normal_, pieces`: into a small buffer that stays in cache, piece by piece;
- `normal_, float32`: the same pieces in float32, added to weights in bfloat16.

All are timed in turns, and each figure is the median over the repeats. `best of torch` is the fastest of torch's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from bench.common import medians, options, write_result

from estune.noise import cpu
from estune.weights.storage import as_array
from estune.weights.tensors import RUN_LENGTH

SIZES = {"256 K elements": 1 << 18, "1 M elements": 1 << 20, "16 M elements": 1 << 24}
PIECE = 1 << 15
MEMBERS = 30
TENSOR = 0x0123456789ABCDEF
SIGMA = 0.001


def torch_ways(live: torch.Tensor) -> dict[str, Callable[[int, float], None]]:
    """Ways to add a seed's noise to `live`, times a scale."""
    size, dtype = live.numel(), live.dtype
    buffer, piece = torch.empty(size, dtype=dtype), torch.empty(PIECE, dtype=dtype)
    wide = torch.empty(PIECE)
    generator = torch.Generator()

    def seeded(seed: int) -> torch.Generator:
        return generator.manual_seed(seed)

    def randn(seed: int, scale: float) -> None:
        live.add_(torch.randn(size, generator=seeded(seed), dtype=dtype), alpha=scale)

    def randn_out(seed: int, scale: float) -> None:
        live.add_(torch.randn(size, generator=seeded(seed), dtype=dtype, out=buffer), alpha=scale)

    def normal(seed: int, scale: float) -> None:
        live.add_(buffer.normal_(generator=seeded(seed)), alpha=scale)

    def pieces(seed: int, scale: float, part: torch.Tensor = piece) -> None:
        seeded(seed)
        for start in range(0, size, PIECE):
            live[start : start + PIECE].add_(part.normal_(generator=generator), alpha=scale)

    ways: dict[str, Callable[[int, float], None]] = {
        "randn": randn,
        "randn, out": randn_out,
        "normal_": normal,
        "normal_, pieces": pieces,
    }
    if dtype != torch.float32:
        ways["normal_, float32"] = lambda seed, scale: pieces(seed, scale, wide)
    return ways


def compare(size: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Million elements a second of each way, for tensors of `size` elements."""
    base = torch.randn(size).to(dtype)
    live = base.clone()
    base_array, live_array = as_array(base), as_array(live)
    calls = max(1, (1 << 22) // size)  # so that small tensors are timed over as many elements

    def fused(seed: int, scale: float) -> None:
        for start in range(0, size, RUN_LENGTH):
            run = slice(start, start + RUN_LENGTH)
            cpu.perturb(live_array[run], base_array[run], seed, TENSOR, start, scale)

    ways = {"estune": fused, **torch_ways(live)}
    work = {name: lambda way=way: [way(seed, SIGMA) for seed in range(calls)] for name, way in ways.items()}
    return _rates(medians(work, repeats), size * calls)


def update(size: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Million element-members a second of an update by 30 members."""
    base = torch.randn(size).to(dtype)
    array = as_array(base)
    seeds = np.arange(MEMBERS, dtype=np.uint64)
    coefficients = np.full(MEMBERS, 1e-6, np.float32)

    def fused() -> None:
        for start in range(0, size, RUN_LENGTH):
            cpu.update(array[start : start + RUN_LENGTH], seeds, coefficients, TENSOR, start)

    work: dict[str, Callable[[], object]] = {"estune": fused}
    work |= {
        name: lambda way=way: [way(seed, 1e-6) for seed in range(MEMBERS)] for name, way in torch_ways(base).items()
    }
    return _rates(medians(work, repeats, warm_up=1), size * MEMBERS)


def two_threads(size: int, repeats: int) -> dict[str, float]:
    """Million elements a second of two Python threads at once, and of one: kernels release the interpreter."""
    base = as_array(torch.randn(size))
    live = base.copy()
    starts = list(range(0, size, RUN_LENGTH))

    def perturb(start: int) -> None:
        run = slice(start, start + RUN_LENGTH)
        cpu.perturb(live[run], base[run], 1, TENSOR, start, SIGMA)

    with ThreadPoolExecutor(2) as threads:
        work: dict[str, Callable[[], object]] = {
            "two threads": lambda: list(threads.map(perturb, starts)),
            "one thread": lambda: list(map(perturb, starts)),
        }
        seconds = medians(work, repeats)
    rates = {name: round(size / value / 1e6, 1) for name, value in seconds.items()}
    return {**rates, "two threads / one thread": round(rates["two threads"] / rates["one thread"], 2)}


def _rates(seconds: dict[str, float], elements: int) -> dict[str, float]:
    rates = {name: round(elements / value / 1e6, 1) for name, value in seconds.items()}
    best = max(rate for name, rate in rates.items() if name != "estune")
    return {**rates, "estune / best of torch": round(rates["estune"] / best, 2)}


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"unit": "million elements a second", "repeats": args.repeats}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for label, size in SIZES.items():
            figures[f"perturb, {name}, {label}"] = compare(size, dtype, args.repeats)
        figures[f"update per member, {name}, 1 M elements"] = update(1 << 20, dtype, max(3, args.repeats // 3))
    figures["perturb, float32, threads"] = two_threads(1 << 24, args.repeats)
    write_result("noise", figures, args.results)


if __name__ == "__main__":
    main()

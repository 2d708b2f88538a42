"""Tokens a second: estune's engine against `generate` in its modes; and how near decoding comes to the machine's peak.

    python -m bench.speed.decode [--sizes 1M 25M 100M] [--dtypes float32 bfloat16]

Random models, the same prompts for all, and no end token: every row runs to the end. `generate` has a dynamic or a
static cache, uncompiled (`bench.speed.step` tries it compiled), on one thread or on all cores. Ours runs as one engine
on one thread, as one engine on all cores, and as one engine per core on one thread each, as training does with small
models. Every contestant has processes of its own. All take turns; medians are compared.

The second part looks at decoding alone, on one thread. Seconds of a token step (one new token for every row): the time
to generate all tokens less the time to generate one, divided by the steps between. Floating-point operations are
counted from the shapes: 2 x the elements of the matrices that a token meets + 4 x heads x head size x tokens seen, in
each layer. The peak is measured in the same run: `torch.mm` at each of the model's shapes, (rows, in) x (in, out), in
that type, one thread, the fastest of three layouts, the operands left in cache. So

- `matrix products at peak` is how long a token step's matrix products would take at that peak;
- `the rest` is what the step takes beyond: attention, norms, activations, choosing tokens, and products below peak;
- `share of the peak` is achieved operations a second by those of `torch.mm` at these shapes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.common import in_turns, medians, options, rounded, settings, write_result
from bench.contestants import Generator, Mode, PlainScript
from bench.models import SHAPES, random_prompts, save_random_model
from bench.processes import Process

from estune.pool.open import available_cores

# What makes a run last minutes, by size: new tokens, repeats.
DEFAULTS = {"1M": (32, 5), "3M": (32, 5), "10M": (32, 3), "25M": (32, 2), "100M": (16, 1)}
LARGE = 1024  # rows and columns of the products that show what the machine can do at all


def tokens_per_second(
    model: Path, prompts: list[list[int]], new: int, dtype: str, repeats: int
) -> tuple[dict[str, float], float]:
    """Tokens a second of each contestant, and seconds of a token step of one engine on one thread."""
    cores = available_cores()
    script = Process(PlainScript, model, prompts, new, dtype)
    engines = [Process(Generator, model, prompts, dtype, 1) for _ in range(cores)]
    wide = Process(Generator, model, prompts, dtype, cores) if cores > 1 else None

    def side_by_side(processes: list[Process], tokens: int, threads: int = 1) -> None:
        for process in processes:
            process.start(threads, "generate", tokens)
        for process in processes:
            process.wait()

    modes = [Mode(cache, threads) for cache in ("dynamic", "static") for threads in sorted({1, cores})]
    work: dict[str, Callable[[], object]] = {
        f"generate, {mode.cache} cache, {_threads(mode.threads)}": (
            lambda mode=mode: script.call(mode.threads, "generate", mode)
        )
        for mode in modes
    }
    work["estune, one engine, 1 thread"] = lambda: side_by_side(engines[:1], new)
    work["first token"] = lambda: side_by_side(engines[:1], 1)
    batches = dict.fromkeys(work, 1)
    if wide:
        work[f"estune, one engine, {cores} threads"] = lambda: side_by_side([wide], new, cores)
        work[f"estune, {cores} engines of 1 thread"] = lambda: side_by_side(engines, new)
        batches |= {f"estune, one engine, {cores} threads": 1, f"estune, {cores} engines of 1 thread": cores}
    side_by_side([*engines, *([wide] if wide else [])], 2)  # whatever is made once
    found = in_turns(work, repeats, warm_up=int(repeats > 1))
    for process in (script, *engines, *([wide] if wide else [])):
        process.close()
    seconds = {name: statistics.median(values) / batches[name] for name, values in found.items()}
    first = seconds.pop("first token")
    step = (seconds["estune, one engine, 1 thread"] - first) / (new - 1)
    return {name: len(prompts) * new / value for name, value in seconds.items()}, step


def near_peak(size: str, prompts: list[list[int]], new: int, dtype: str, step: float) -> dict[str, Any]:
    """A token step by what it computes, against `torch.mm` at the same shapes."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[size]
    rows, head = len(prompts), hidden // heads
    shapes = {  # (in, out): how often in one forward
        (hidden, hidden): 2 * layers,  # queries and output
        (hidden, kv_heads * head): 2 * layers,
        (hidden, intermediate): 2 * layers,
        (intermediate, hidden): layers,
        (hidden, vocabulary): 1,
    }
    kind = getattr(torch, dtype)
    peak = {shape: mm_flops(rows, *shape, kind) for shape in shapes}
    products = {shape: 2.0 * rows * shape[0] * shape[1] * count for shape, count in shapes.items()}
    # Steps 1 to new - 1 see the prompt and all tokens before, their own included.
    seen = statistics.mean(map(len, prompts)) + new / 2
    attention = 4.0 * rows * layers * heads * head * seen
    at_peak = sum(products[shape] / peak[shape] for shape in shapes)
    flops, peak_flops = (sum(products.values()) + attention) / step, sum(products.values()) / at_peak
    return {
        "rows": rows,
        "tokens seen, mean": seen,
        "gflop a token step": {"matrix products": sum(products.values()) / 1e9, "attention": attention / 1e9},
        "gflop per second": flops / 1e9,
        "gflop per second, torch.mm at these shapes": peak_flops / 1e9,
        "gflop per second, torch.mm of large matrices": mm_flops(LARGE, LARGE, LARGE, kind) / 1e9,
        "gflop per second, torch.mm by shape": {f"{rows} x {i} x {o}": peak[i, o] / 1e9 for i, o in shapes},
        "share of the peak": flops / peak_flops,
        "ms a token step": {"matrix products at peak": 1e3 * at_peak, "the rest": 1e3 * (step - at_peak)},
    }


def mm_flops(rows: int, width: int, out: int, dtype: torch.dtype) -> float:
    """Operations a second of `torch.mm` at a shape, on one thread: of three layouts, the fastest."""
    torch.set_num_threads(1)
    x, w = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
    turned, across = w.T.contiguous(), x.T.contiguous()
    calls = max(1, int(2e8 / (rows * width * out)))
    work = {"x @ w.T": (x, w.T), "x @ w": (x, turned), "w @ x.T": (w, across)}
    timed = {name: lambda a=a, b=b: [torch.mm(a, b) for _ in range(calls)] for name, (a, b) in work.items()}
    with torch.inference_mode():
        return 2.0 * rows * width * out * calls / min(medians(timed, repeats=5, warm_up=1).values())


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one size."""
    new, repeats = DEFAULTS[size]
    new, repeats = args.new or new, args.repeats or repeats
    prompts = random_prompts(size, args.rows, args.shared, *args.lengths)
    rates, peaks = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_random_model(size, Path(folder))
        for dtype in args.dtypes:
            start = time.perf_counter()
            rates[dtype], step = tokens_per_second(model, prompts, new, dtype, repeats)
            peaks[dtype] = near_peak(size, prompts, new, dtype, step)
            took = time.perf_counter() - start
            print(f"{size}, {dtype}: {rounded(rates[dtype])}; {took:.0f} s", flush=True)
    return {
        "size": size,
        "new tokens": new,
        "repeats": repeats,
        "tokens per second": rates,
        "decoding against the peak, 1 thread": peaks,
    }


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def main() -> None:
    """Measure, print and write a result for each size."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M", "25M", "100M"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new", type=int, help="by the size if not given")
    parser.add_argument("--shared", type=int, default=8, help="tokens that all prompts begin with")
    parser.add_argument("--lengths", nargs=2, type=int, default=[8, 16], help="shortest and longest rest of a prompt")
    parser.add_argument("--repeats", type=int, help="by the size if not given")
    args = parser.parse_args()
    for size in args.sizes:
        write_result(f"decode-{size}", {"settings": settings(args), **rounded(measure(size, args))}, args.results)


if __name__ == "__main__":
    main()

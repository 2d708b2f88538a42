"""Tokens a second: our decode loop against `generate` at its best settings, same model and prompts, no end token.

    python -m bench.decode [--sizes 1M 25M] [--threads 1 2] [--dtypes float32 bfloat16]

Two ways of using several cores are measured for ours: one engine whose operations use all threads, and one engine per
core with one thread each, as training does. `generate` runs with a dynamic and with a static cache. All take turns;
medians are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from bench.common import write_result
from bench.models import SHAPES, random_model
from transformers import GenerationConfig

from estune.engines.base import Sampling
from estune.engines.decode import Decoder


def draw_prompts(rows: int, shared: int, shortest: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of mixed lengths behind a shared prefix, by rising length."""
    draw = random.Random(0)
    head = [draw.randrange(vocabulary) for _ in range(shared)]
    tails = [[draw.randrange(vocabulary) for _ in range(draw.randint(shortest, longest))] for _ in range(rows)]
    return sorted((head + tail for tail in tails), key=len)


def generator(model: Any, prompts: list[list[int]], new: int, cache: str | None) -> Callable[[], object]:
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=[],
        pad_token_id=1,
        cache_implementation=cache,
        disable_compile=True,  # starts for a minute, and gains a twentieth
    )

    def run() -> object:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=mask, generation_config=settings)

    return run


def side_by_side(decoders: list[Decoder], prompts: list[list[int]], new: int) -> Callable[[], object]:
    def run() -> object:
        threads = [
            threading.Thread(target=decoder.run, args=(prompts, range(len(prompts)), Sampling(new)))
            for decoder in decoders
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return None

    return run


def measure(size: str, dtype: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second of each way, by number of threads."""
    models = [random_model(size, init=0.2).to(getattr(torch, dtype)) for _ in range(max(args.threads))]
    shortest, longest = args.lengths
    prompts = draw_prompts(args.rows, args.shared, shortest, longest, models[0].config.vocab_size)
    decoders = [Decoder(model, [], 1) for model in models]
    found: dict[str, dict[str, float]] = {}
    for threads in args.threads:
        # name: (call, threads inside an operation, batches a call completes)
        ways: dict[str, tuple[Callable[[], object], int, int]] = {
            "generate, dynamic cache": (generator(models[0], prompts, args.new, None), threads, 1),
            "generate, static cache": (generator(models[0], prompts, args.new, "static"), threads, 1),
            "ours, one engine": (side_by_side(decoders[:1], prompts, args.new), threads, 1),
        }
        if threads > 1:
            ways["ours, engine per core"] = (side_by_side(decoders[:threads], prompts, args.new), 1, threads)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):
            for name, (run, inside, batches) in ways.items():
                torch.set_num_threads(inside)
                start = time.perf_counter()
                run()
                if repeat:
                    seconds[name].append((time.perf_counter() - start) / batches)
        tokens = args.rows * args.new
        found[f"{threads} threads"] = {name: round(tokens / statistics.median(s)) for name, s in seconds.items()}
        print(size, dtype, f"{threads} threads", found[f"{threads} threads"], flush=True)
    return found


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--shared", type=int, default=8, help="tokens that all prompts begin with")
    parser.add_argument("--lengths", nargs=2, type=int, default=[8, 16], help="shortest and longest rest of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    figures = {size: {dtype: measure(size, dtype, args) for dtype in args.dtypes} for size in args.sizes}
    write_result("decode", {"settings": vars(args), "tokens_per_second": figures})


if __name__ == "__main__":
    main()

"""How fast an engine generates while its weights are perturbed in place, beside the same library's plain inference.

    python -m bench.gpu.engine [--engine transformers|vllm] [--sizes 0.5B 3B 7B] [--rows 200] [--new-tokens 1024]
        [--at-once 2] [--profile]

Of random bfloat16 models of Qwen2.5's shapes, whose completions none ends early. Two contestants, each in a process of
its own, one after the other, as each takes the memory it can get:

- `plain`: the library alone, `vllm.LLM.generate` or transformers' `generate` with its static cache; the prompts of one
  member, greedily, as in the paper;
- `estune`: members of a population, one after another: perturb, generate. With `--at-once N`, N engines that share the
  device, opened together, each with a member of its own.

`training / plain` is what is left of plain inference's tokens a second in a step of 30 members, its update and
fingerprint included. `threads agree` says that a member's completions are the same whichever thread asks first: a
wrong stream would show there; and `perturbed after a restore` that a restore is over before the next member begins.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench.common import options, rounded, settings, write_result
from bench.gpu import accelerator
from bench.models import QWEN_SHAPES, SHAPES, random_prompts, save_random_model
from bench.processes import Process
from torch import profiler

from estune.completion import Sampling
from estune.config import Config
from estune.es.strategy import Member, Update
from estune.weights.device import chosen_device

MEMBERS, SIGMA, CHECKED = 30, 0.001, 16
PROMPT = {"shared": 60, "shortest": 20, "longest": 40}  # tokens


class Plain:
    """The library alone."""

    def __init__(self, engine: str, folder: Path, device: str, new_tokens: int) -> None:
        self.device = chosen_device(device)
        self.new_tokens = new_tokens
        self._generate = self._vllm(folder) if engine == "vllm" else self._transformers(folder)

    def generate(self, prompts: list[list[int]]) -> int:
        """How many tokens were generated."""
        return self._generate(prompts)

    def _vllm(self, folder: Path) -> Callable[[list[list[int]]], int]:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork cannot use a GPU that this process has looked for
        vllm = importlib.import_module("vllm")
        # On a CPU vLLM wants nearly all memory there is, of which others have some.
        toy: dict[str, Any] = {"gpu_memory_utilization": 0.2} if self.device.type == "cpu" else {}
        llm = vllm.LLM(model=str(folder), skip_tokenizer_init=True, seed=0, dtype="bfloat16", **toy)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=self.new_tokens, ignore_eos=True, detokenize=False)

        def generate(prompts: list[list[int]]) -> int:
            made = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in made)

        return generate

    def _transformers(self, folder: Path) -> Callable[[list[list[int]]], int]:
        transformers = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(self.device)

        @torch.inference_mode()
        def generate(prompts: list[list[int]]) -> int:
            width = max(map(len, prompts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
            made = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=self.new_tokens,
                max_new_tokens=self.new_tokens,
                cache_implementation="static",
                disable_compile=self.device.type == "cpu",
            )
            return int(made[:, width:].numel())

        return generate


class Ours:
    """A replica: the engine with its weights."""

    def __init__(self, engine: str, folder: Path, device: str, new_tokens: int, at_once: int) -> None:
        # Here, and not above: on a CPU vLLM by itself cannot start where our kernels are imported.
        from estune.pool.open import with_length
        from estune.pool.replica import Replica

        self.device = chosen_device(device)
        sharing: dict[str, Any] = {"workers": at_once, "workers_per_gpu": at_once} if at_once > 1 else {}
        config = Config(
            model=str(folder),
            engine=engine,
            device=device,
            dtype="bfloat16",
            population=MEMBERS,
            max_new_tokens=new_tokens,
            **sharing,
        )
        self.replica = Replica(with_length(config, PROMPT["shared"] + PROMPT["longest"]))
        self.sampling = Sampling(new_tokens)
        self.threads = ThreadPoolExecutor(1)
        self.members = 0

    def generate(self, prompts: list[list[int]]) -> tuple[int, float, float]:
        """Tokens that a new member generated, its seconds of perturbing and of generating.

        In another thread than the one that opened the engine, as in a pool of replicas.
        """
        self.members += 1
        found = self.threads.submit(self._evaluate, self.members, prompts, self.sampling).result()
        return sum(len(c.token_ids) for c in found.completions), found.perturb_time, found.generate_time

    def update(self) -> tuple[float, float]:
        """Seconds of the update of 30 members, and of the fingerprint."""
        weights = self.replica.weights
        weights.restore()
        seconds = []
        update = Update(0, tuple(map(Member, range(MEMBERS))), (1e-7,) * MEMBERS)
        for work in (lambda: weights.apply(update), weights.fingerprint):
            start = time.perf_counter()
            work()
            torch.get_device_module(self.device).synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds[0], seconds[1]

    def checks(self, prompts: list[list[int]]) -> dict[str, bool]:
        """Whether a member's completions are the same in whatever thread, and after whatever came before."""
        short = Sampling(CHECKED)

        def member(seed: int) -> list[list[int]]:
            return [list(c.token_ids) for c in self._evaluate(seed, prompts, short).completions]

        def elsewhere(seed: int) -> list[list[int]]:
            return self.threads.submit(member, seed).result()

        first, again, here, other = elsewhere(5), elsewhere(5), member(5), member(6)
        self.replica.weights.restore()
        return {
            "threads agree": first == again == here,
            "members differ": here != other,
            "perturbed after a restore": elsewhere(6) == other,
        }

    def memory(self) -> float:
        """Peak of GB allocated on the device in this process; 0 without CUDA."""
        return torch.cuda.max_memory_allocated() / 1e9

    def profile(self, prompts: list[list[int]]) -> str:
        """Where a short member's time on the device goes, by kernel; the transformers engine runs in this process."""
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as found:
            self._evaluate(5, prompts, Sampling(4 * CHECKED))
        return str(found.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70))

    def _evaluate(self, seed: int, prompts: list[list[int]], sampling: Sampling) -> Any:
        return self.replica.evaluate(Member(seed), SIGMA, prompts, sampling)


def measure(size: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats; the first turn of each contestant, which compiles and captures, is left out."""
    device = str(chosen_device(args.device))
    model = save_random_model(size, folder / size, init=0.05, dtype=torch.bfloat16, device=device)
    prompts = random_prompts(size, args.rows, **PROMPT)
    figures: dict[str, Any] = {}
    if not args.no_plain:
        plain = Process(Plain, args.engine, model, args.device, args.new_tokens)
        made = [_call(plain, "generate", prompts, args) for _ in range(1 + args.repeats)]
        plain.close()
        figures["plain, tokens a second"] = statistics.median(tokens / seconds for tokens, seconds in made[1:])
    with ThreadPoolExecutor(args.at_once) as threads:
        arguments = args.engine, model, args.device, args.new_tokens, args.at_once
        crew = list(threads.map(lambda _: Process(Ours, *arguments), range(args.at_once)))
        turns = [
            list(threads.map(lambda one: _call(one, "generate", prompts, args), crew)) for _ in range(1 + args.repeats)
        ]
    rates, perturbs, generates = [], [], []
    for turn in turns[1:]:
        tokens, perturb, generate = zip(*(result for result, _ in turn), strict=True)
        rates.append(sum(tokens) / max(generate))
        perturbs.append(max(perturb))
        generates.append(max(generate))
    ours = crew[0]
    ours.call(1, "update")  # compiles
    update, fingerprint = ours.call(1, "update")[0]
    perturb, generate = statistics.median(perturbs), statistics.median(generates)
    figures["estune, tokens a second"] = statistics.median(rates)
    figures["ms a token of all rows"] = 1e3 * generate / args.new_tokens
    figures["seconds"] = {"perturb": perturb, "generate": generate, "update of 30": update, "fingerprint": fingerprint}
    figures["peak, GB"] = ours.call(1, "memory")[0]
    figures["share of generating"] = generate / (perturb + generate + (update + fingerprint) * args.at_once / MEMBERS)
    if not args.no_plain:
        training = figures["estune, tokens a second"] * figures["share of generating"]
        figures["training / plain"] = training / figures["plain, tokens a second"]
    figures |= ours.call(1, "checks", prompts)[0]
    if args.profile:
        print(ours.call(1, "profile", prompts)[0], flush=True)
    for one in crew:
        one.close()
    return figures


def _call(contestant: Process, method: str, prompts: list[list[int]], args: argparse.Namespace) -> tuple[Any, float]:
    return contestant.call(args.threads, method, prompts)


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--sizes", nargs="+", choices=[*SHAPES, *QWEN_SHAPES], default=list(QWEN_SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="engines that share the device")
    parser.add_argument("--profile", action="store_true", help="show the kernels that take longest")
    parser.add_argument("--no-plain", action="store_true", help="leave plain inference out")
    args = parser.parse_args()
    figures: dict[str, Any] = {"settings": settings(args), **accelerator(chosen_device(args.device))}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            figures[size] = measure(size, Path(folder), args)
        # After each size: what is there counts, also where the next one takes too long.
        write_result(f"gpu-{args.engine}{f'-{args.at_once}' * (args.at_once > 1)}", rounded(figures), args.results)


if __name__ == "__main__":
    main()

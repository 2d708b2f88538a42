"""One step of evolution: ours against a plain script in the paper's manner, and against `generate` at its best.

    python -m bench.speed.step [--model embedded|1M|3M|10M|25M|100M|DIR] [--members N] [--prompts 200] [--repeats R]

All do the same work: `members` times perturb all weights and complete the prompts greedily, then update the weights
from all members. Grading is left out of all. The contestants:

- the paper's: noise from `torch.randn`, added and subtracted again; `generate` with its defaults, all prompts in one
  left-padded batch, float32, with one thread or with all cores, whichever is faster;
- `generate` at its best, in float32 and in bfloat16: the same script in the fastest of its modes. One member is timed
  in each mode (dynamic or static cache, one thread or all cores); then in the best one with prompts sorted by length
  into four batches; then with a compiled static cache, if its first member is done within a minute. The fastest takes
  part;
- ours, in float32 and in bfloat16, as `estune train` would run it on this machine.

All take turns, and medians are compared. Scripts have processes of their own, so that nothing that estune sets for its
process helps them or hinders. Before anything is timed, all complete the prompts with the same weights: a member's and,
where the model has learnt something, its own. In float32 all completions should agree; in bfloat16 implementations
round differently, and the share that agrees says how much.

Random models hardly ever end a completion. So they are measured twice: once as they are, where no row ends early; once
with a set of end tokens, the same for all contestants, that makes completions half as long on average, with a natural
spread. The embedded model ends its completions itself.

With larger models there are fewer members: each costs the same, and `seconds a member` is what to compare.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench.common import options, rounded, settings, write_result
from bench.contestants import Mode, Ours, PlainScript, parameters, tiny_coefficients
from bench.models import SHAPES, choose_end_ids, countdown_prompts, random_prompts, save_random_model
from bench.processes import Process

from estune.completion import Sampling
from estune.config import Config
from estune.engines.transformers import TransformersEngine
from estune.es.strategy import Member
from estune.pool.open import available_cores
from estune.weights.locate import locate

DTYPES = ("float32", "bfloat16")
# What makes a run last minutes, by model: members, new tokens, sigma, repeats, probes of each mode.
DEFAULTS = {"embedded": (30, 40, 0.012, 5, 3), "25M": (4, 32, 0.001, 2, 1), "100M": (2, 16, 0.001, 1, 1)}
OTHERWISE = (8, 32, 0.001, 3, 2)
COMPILE_SECONDS = 60


class Case:
    """All contestants over one checkpoint."""

    def __init__(self, model: Path, prompts: list[list[int]], args: argparse.Namespace) -> None:
        self.args, self.model, self.prompts = args, model, prompts
        self.seeds = list(range(args.members))
        self.scripts = {dtype: self._script(dtype) for dtype in DTYPES}
        self.compiled: dict[str, Process] = {}
        self.ours = {dtype: self._ours(dtype) for dtype in DTYPES}

    def _script(self, dtype: str) -> Process:
        return Process(PlainScript, self.model, self.prompts, self.args.new_tokens, dtype)

    def _ours(self, dtype: str) -> Ours:
        config = Config(model=str(self.model), dtype=dtype, population=self.args.members)
        return Ours(config, self.prompts, self.args.new_tokens)

    def measure(self, try_compiled: bool) -> dict[str, Any]:
        """Agreement, then the fastest modes, then whole steps in turns."""
        agree = {dtype: self.agreement(dtype) for dtype in DTYPES}
        print(f"completions that agree, of {len(self.prompts)}: {agree}", flush=True)
        probes: dict[str, dict[Mode, float]] = {dtype: self.probe(dtype) for dtype in DTYPES}
        compiled = {dtype: self.probe_compiled(dtype, probes[dtype]) for dtype in DTYPES} if try_compiled else {}
        found = self.steps(probes)
        return {
            "agree": agree,
            "seconds for one member, by mode of generate": {
                dtype: {str(mode): seconds for mode, seconds in modes.items()} for dtype, modes in probes.items()
            },
            "compiled": compiled,
            **found,
        }

    def agreement(self, dtype: str) -> dict[str, int]:
        """Completions that agree, with base weights and with those of a member, which the script is given."""
        ours, script, agree = self.ours[dtype], self.scripts[dtype], {}
        weights = ours.replica.weights
        for name in ("perturbed",) if self.args.model in SHAPES else ("perturbed", "base"):
            if name == "perturbed":
                weights.perturb(Member(123), self.args.sigma)
            else:
                weights.restore()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "weights.pt"
                ours.save(file)
                script.call(1, "load", file)
            theirs, _ = script.call(available_cores(), "completions")
            agree[name] = sum(a == b for a, b in zip(theirs, ours.completions(), strict=True))
        return agree

    def probe(self, dtype: str) -> dict[Mode, float]:
        """Seconds that one member takes in each mode."""
        threads = sorted({1, available_cores()})
        found = {
            mode: self._probe_mode(self.scripts[dtype], mode)
            for mode in (Mode(cache, t) for cache in ("dynamic", "static") for t in threads)
        }
        sorted_batches = replace(_fastest(found), batches=4)
        found[sorted_batches] = self._probe_mode(self.scripts[dtype], sorted_batches)
        return found

    def probe_compiled(self, dtype: str, found: dict[Mode, float]) -> str:
        """Try the compiled static cache, in a process that can be stopped; add it to the modes if it starts in time."""
        static = min((mode for mode in found if mode.cache == "static"), key=lambda mode: found[mode])
        mode, script = replace(static, batches=1, compiled=True), self._script(dtype)
        start = time.perf_counter()
        script.start(mode.threads, "step", mode, self.seeds[:1], self.args.sigma, [0.0])
        try:
            script.wait(COMPILE_SECONDS)
        except (TimeoutError, RuntimeError) as error:
            script.close()
            why = "no member done after a minute" if isinstance(error, TimeoutError) else f"failed: {error}"[:300]
            print(f"{dtype}, {mode}: {why}", flush=True)
            return why
        started = time.perf_counter() - start
        self.compiled[dtype] = script
        found[mode] = self._probe_mode(script, mode)
        return f"first member after {started:.0f} s"

    def _probe_mode(self, script: Process, mode: Mode) -> float:
        seconds = [
            script.call(mode.threads, "step", mode, self.seeds[:1], self.args.sigma, [0.0])[1]
            for _ in range(self.args.probes)
        ]
        print(f"one member, {mode}: {min(seconds):.2f} s", flush=True)
        return min(seconds)

    def steps(self, probes: dict[str, dict[Mode, float]]) -> dict[str, Any]:
        """Whole steps of all contestants in turns."""
        paper = _fastest({m: s for m, s in probes["float32"].items() if m.cache == "dynamic" and m.batches == 1})
        chosen = {"paper's script, float32": ("float32", paper)}
        chosen |= {f"generate at its best, {dtype}": (dtype, _fastest(probes[dtype])) for dtype in DTYPES}
        work: dict[str, Callable[[], tuple[float, float]]] = {
            name: lambda dtype=dtype, mode=mode: self._script_step(dtype, mode)
            for name, (dtype, mode) in chosen.items()
        }
        work |= {f"estune, {dtype}": lambda ours=ours: self._our_step(ours) for dtype, ours in self.ours.items()}
        for ours in self.ours.values():  # scripts are warm from probing
            ours.warm_up()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        tokens: dict[str, float] = {}
        for _ in range(self.args.repeats):
            for name, run in work.items():
                took, tokens[name] = run()
                seconds[name].append(took)
            print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        rows = self.args.members * len(self.prompts)
        return {
            "mode": {name: f"{dtype}, {mode}" for name, (dtype, mode) in chosen.items()},
            "replicas and threads": {d: [len(o.pool.replicas), o.config.threads] for d, o in self.ours.items()},
            "median seconds": median,
            "seconds": seconds,
            "seconds a member": {name: value / self.args.members for name, value in median.items()},
            "mean completion length": {name: count / rows for name, count in tokens.items()},
            "tokens per second": {name: tokens[name] / value for name, value in median.items()},
            "times as fast": {
                f"{ours} against {other}": median[other] / median[ours]
                for ours in median
                if ours.startswith("estune")
                for other in chosen
            },
        }

    def _script_step(self, dtype: str, mode: Mode) -> tuple[float, float]:
        script = self.compiled[dtype] if mode.compiled else self.scripts[dtype]
        script.call(1, "reset")
        script.call(1, "count")
        order = (mode, self.seeds, self.args.sigma, tiny_coefficients(self.seeds))
        _, seconds = script.call(mode.threads, "step", *order)
        return seconds, script.call(1, "count")[0]

    def _our_step(self, ours: Ours) -> tuple[float, float]:
        start = time.perf_counter()
        parts = ours.step(self.seeds, self.args.sigma, tiny_coefficients(self.seeds))
        return time.perf_counter() - start, parts["tokens"]

    def close(self) -> None:
        contestants: list[Any] = [*self.scripts.values(), *self.compiled.values(), *self.ours.values()]
        for contestant in contestants:
            contestant.close()


def _fastest(found: dict[Mode, float]) -> Mode:
    return min(found, key=lambda mode: found[mode])


def checkpoints(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Path], list[list[int]]]:
    """The checkpoint of each case, and the prompts."""
    if args.model not in SHAPES:
        return {"as the model ends": locate("tiny" if args.model == "embedded" else args.model)}, _text_prompts(args)
    prompts = random_prompts(args.model, args.prompts)
    endless = save_random_model(args.model, scratch / "endless")
    made = TransformersEngine(endless, device="cpu").generate(prompts, Sampling(args.new_tokens))
    end_ids = choose_end_ids(made, args.new_tokens, SHAPES[args.model][-1])
    ending = save_random_model(args.model, scratch / "ending", end_ids)
    return {"rows end early": ending, "no row ends early": endless}, prompts


def _text_prompts(args: argparse.Namespace) -> list[list[int]]:
    return countdown_prompts(args.prompts, "tiny" if args.model == "embedded" else args.model)


def parse() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", default="embedded", help="embedded, a size of random model, or a checkpoint")
    parser.add_argument("--prompts", type=int, default=200)
    for name, kind in (("members", int), ("new-tokens", int), ("sigma", float), ("repeats", int), ("probes", int)):
        parser.add_argument(f"--{name}", type=kind, help="by the model if not given")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave the compiled cache out")
    args = parser.parse_args()
    names = ("members", "new_tokens", "sigma", "repeats", "probes")
    for name, default in zip(names, DEFAULTS.get(args.model, OTHERWISE), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.members < 2:
        parser.error("--members: a step has 2 or more")
    return args


def main() -> None:
    """Measure, print and write the result."""
    args = parse()
    torch.set_num_threads(available_cores())
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models, prompts = checkpoints(args, Path(scratch))
        for name, model in models.items():
            print(f"{args.model}, {name}", flush=True)
            case = Case(model, prompts, args)
            engine: Any = case.ours["float32"].replica.engine
            count = parameters(engine.model)
            cases[name] = case.measure(try_compiled=args.compile and not cases)
            case.close()
    figures = {"model": args.model, "parameters": count, "settings": settings(args), "cases": rounded(cases)}
    write_result(f"step-{Path(args.model).name}", figures, args.results)


if __name__ == "__main__":
    main()

"""All that only a GPU can show, in one go: bits, bandwidth, tokens a second, whole runs, vLLM.

    make gpu-day                                    all of it
    python -m bench.gpu.day --list                  what there is
    python -m bench.gpu.day --steps bits weights    some of it
    python -m bench.gpu.day --toy                   on a CPU, at toy size: that the kit itself works

Each step is a command of its own with at most ten minutes. One that fails is said, and the next begins. What a step
prints goes to `gpu-day/NAME.log` in the folder of `--results`, and its figures, as the script writes them, to
`gpu-day/NAME/`; `gpu-day-DATE.json` has all figures, what passed, and each figure that has a bar beside it. Ctrl-C ends
the step that runs, and what was found before is written down. The exit code is 1 where a step failed or missed a bar.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from bench.common import options, settings, write_result
from rich.console import Console
from rich.table import Table

TIMEOUT = 600
TESTS = "tests.xml"
GPU_TESTS = (
    "tests/noise/test_noise_gpu.py",
    "tests/noise/test_gpu_inplace.py",
    "tests/noise/test_gpu_low_rank.py",
    "tests/weights/test_weights_gpu.py",
    "tests/weights/test_weights_pieces.py",
    "tests/engines/test_graph.py",
)
TOY_TESTS = ("tests/noise/test_noise_gpu.py",)
TOY_MODEL = ("--device", "cpu", "--sizes", "1M", "--rows", "2", "--new-tokens", "4")
TOY_RUN = ("population=2", "prompts_per_step=2", "max_new_tokens=4", "eval_steps=0", "eval_samples=2")
Bar = Callable[[float], bool]


@dataclass(frozen=True)
class Step:
    """One command, and what its figures have to be.

    Attributes:
        question: what it answers.
        command: after `python -m`.
        toy: the same at toy size on a CPU.
        needs: a package without which it is left out.
        bars: path of a figure, the words of its bar, and whether a value reaches it.
        environment: variables that it is started with.
    """

    question: str
    command: tuple[str, ...]
    toy: tuple[str, ...]
    needs: str = "torch"
    bars: tuple[tuple[str, str, Bar], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


ENGINE = "bench.gpu.engine"
SOUND = ("threads agree", "members differ", "perturbed after a restore")


def _sound(*sizes: str) -> tuple[tuple[str, str, Bar], ...]:
    return tuple((f"{size}/{check}", "true", bool) for size in sizes for check in SOUND)


STEPS: dict[str, Step] = {
    "bits": Step(
        "Are noise, weights and captured steps the CPU's, bit for bit?",
        ("pytest", "-q", "-o", "filterwarnings=default", *GPU_TESTS),
        ("pytest", "-q", *TOY_TESTS),
    ),
    "weights": Step(
        "How near are perturbing and updating to copying?",
        ("bench.gpu.weights",),
        ("bench.gpu.weights", "--device", "cpu", "--sizes", "1M", "--repeats", "1"),
        bars=(
            ("7B/master/perturb / copy", "at most 1 / 0.7", lambda x: x <= 1 / 0.7),
            ("7B/copy/perturb / copy", "at most 1 / 0.7", lambda x: x <= 1 / 0.7),
            ("7B/copy/update, ms", "under 700", lambda x: x < 700),
        ),
    ),
    "training": Step(
        "Does a run replay on the CPU, and survive a kill, to the same bits?",
        ("bench.gpu.training",),
        ("bench.gpu.training", "--device", "cpu", "--steps", "2", *TOY_RUN, "--variants", "defaults"),
        bars=(
            *(
                (f"{name}/replays on the CPU", "true", bool)
                for name in ("defaults", "base on the host", "weights=copy", "bfloat16", "rank one")
            ),
            ("killed and resumed to the same bits", "true", bool),
        ),
    ),
    "transformers": Step(
        "How fast is the transformers engine, against `generate`?",
        (ENGINE, "--sizes", "0.5B", "3B"),
        (ENGINE, *TOY_MODEL),
        bars=(("0.5B/training / plain", "at least 1", lambda x: x >= 1), *_sound("0.5B", "3B")),
    ),
    "transformers-7B": Step(
        "The same for 7B, and which kernels take its time",
        (ENGINE, "--sizes", "7B", "--no-plain", "--profile"),
        (ENGINE, *TOY_MODEL, "--no-plain"),
        bars=_sound("7B"),
    ),
    "vllm": Step(
        "How fast is vLLM with weights perturbed in place, against vLLM alone?",
        (ENGINE, "--engine", "vllm", "--sizes", "0.5B", "3B", "--repeats", "2"),
        (ENGINE, "--engine", "vllm", *TOY_MODEL),
        needs="vllm",
        bars=(
            *((f"{size}/training / plain", "at least 0.91", lambda x: x >= 0.91) for size in ("0.5B", "3B")),
            *_sound("0.5B", "3B"),
        ),
    ),
    "vllm-7B": Step(
        "The same for 7B with 128 prompts, of which the best public figure of ES is 9,045 tokens a second on an H100",
        (ENGINE, "--engine", "vllm", "--sizes", "7B", "--rows", "128", "--repeats", "2"),
        (ENGINE, "--engine", "vllm", *TOY_MODEL),
        needs="vllm",
        bars=(
            ("7B/training / plain", "at least 0.91", lambda x: x >= 0.91),
            ("7B/estune, tokens a second", "at least 9,045", lambda x: x >= 9045),
            *_sound("7B"),
        ),
    ),
    "vllm-new-runner": Step(
        "Does vLLM's second model runner give the same, as fast?",
        (ENGINE, "--engine", "vllm", "--sizes", "0.5B", "--no-plain"),
        (ENGINE, "--engine", "vllm", *TOY_MODEL, "--no-plain"),
        needs="vllm",
        bars=_sound("0.5B"),
        environment={"VLLM_USE_V2_MODEL_RUNNER": "1"},
    ),
    "vllm-two": Step(
        "Do two engines start and generate at once on one GPU?",
        (ENGINE, "--engine", "vllm", "--sizes", "0.5B", "--no-plain", "--at-once", "2"),
        (ENGINE, "--engine", "vllm", *TOY_MODEL, "--no-plain", "--at-once", "2"),
        needs="vllm",
        bars=_sound("0.5B"),
    ),
}


def run(name: str, step: Step, results: Path, *, toy: bool) -> dict[str, Any]:
    """Run one step; what became of it."""
    if importlib.util.find_spec(step.needs) is None:
        return {"outcome": f"left out: {step.needs} is not installed"}
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    for left in (folder / TESTS, *folder.glob("*.json")):
        left.unlink(missing_ok=True)
    command = [sys.executable, "-m", *(step.toy if toy else step.command)]
    command += [f"--junitxml={folder / TESTS}"] if command[2] == "pytest" else ["--results", str(folder)]
    start = time.perf_counter()
    failure = _run(command, results / f"{name}.log", step.environment)
    outcome = f"failed: {failure}, see {name}.log" if failure else "passed"
    figures = _figures(folder)
    bars = {} if toy else dict(_bars(step, figures))
    if outcome == "passed" and not all(bar["reached"] for bar in bars.values()):
        outcome = "missed a bar"
    return {
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "command": " ".join(["python", *command[1:-1]]),
        "bars": bars,
        "figures": figures,
    }


def run_all(steps: Mapping[str, Step], results: Path, console: Console, *, toy: bool) -> dict[str, Any]:
    """Run steps, and say how each went; what became of them or, once Ctrl-C is pressed, of those before."""
    found: dict[str, Any] = {}
    with suppress(KeyboardInterrupt):
        for name, step in steps.items():
            console.print(f"[bold]{name}[/]: {step.question}", soft_wrap=True)
            with console.status(f"{name}, at most {TIMEOUT // 60} minutes; see {results / name}.log"):
                found[name] = run(name, step, results, toy=toy)
            console.print(f"    {found[name]['outcome']}, {found[name].get('seconds', 0)} s")
    return found


def _run(command: list[str], log: Path, environment: Mapping[str, str]) -> str:
    """How a command failed; nothing where it did not. Whatever it has started ends with it, and leaves the GPU."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"not done after {TIMEOUT} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with {code}" if code else ""


def _figures(folder: Path) -> dict[str, Any]:
    """What a step has written: a script's figures, or pytest's counts."""
    if (tests := folder / TESTS).is_file():
        suite = ElementTree.parse(tests).getroot().find("testsuite")
        counted = ("tests", "failures", "errors", "skipped")
        return {} if suite is None else {name: int(suite.attrib[name]) for name in counted}
    found: dict[str, Any] = {}
    for path in folder.glob("*.json"):
        found |= json.loads(path.read_text())
    return found


def _bars(step: Step, figures: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, words, reaches in step.bars:
        value: Any = figures
        # "perturb / copy" is a name with spaces; a path has none around its slashes.
        for part in path.replace(" / ", "\0").split("/"):
            value = value.get(part.replace("\0", " / ")) if isinstance(value, Mapping) else None
        yield path, {"bar": words, "found": value, "reached": value is not None and reaches(value)}


def main() -> None:
    """Run the steps that are asked for, say how each went, and write all down."""
    parser = options(__doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy size")
    parser.add_argument("--list", action="store_true", help="say what each step answers, and stop")
    args = parser.parse_args()
    console = Console()
    if args.list:
        for name, step in STEPS.items():
            console.print(f"[bold]{name}[/]: {step.question}\n    python -m {' '.join(step.command)}", soft_wrap=True)
        return
    if not (args.toy or torch.cuda.is_available()):
        parser.error("this PyTorch sees no GPU; --toy runs the steps at toy size on a CPU")
    results: Path = args.results / "gpu-day"
    found = run_all({name: STEPS[name] for name in args.steps}, results, console, toy=args.toy)
    if found:
        write_result("gpu-day", {"settings": settings(args), **found}, args.results)
    table = Table("step", "figure", "bar", "found", "reached")
    for name, one in found.items():
        for path, bar in one.get("bars", {}).items():
            table.add_row(name, path, bar["bar"], str(bar["found"]), "yes" if bar["reached"] else "NO")
    if table.row_count:
        console.print(table)
    if len(found) < len({*args.steps}):
        raise SystemExit(130)
    if any(one["outcome"].startswith(("failed", "missed")) for one in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""What every measurement shares: its options, the machine it ran on, fair timing, and where its figures go."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Key = TypeVar("Key")  # of a piece of work

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("estune", "torch", "transformers", "numba", "numpy")
# What decides how fast a CPU multiplies matrices in float32 and in bfloat16.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    return parser


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a script was told, for its result."""
    return {key: value for key, value in vars(arguments).items() if key != "results"}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and load, so that a figure can be judged."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_info("flags").split()
    return {
        "cpu": _cpu_info("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none of a file that is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add_missing(
    path: Path, wanted: Iterable[Mapping[str, Any]], run: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Make the runs that have no line in a file of results yet, and add the line of each as soon as it ends.

    Args:
        path: the file, of JSON lines. Its folder is made.
        wanted: of each run what tells it from others, by its names in the line.
        run: is given these values in their order, and returns the line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = read_lines(path)
    for which in wanted:
        if not any(which.items() <= line.items() for line in there):
            line = run(*which.values())
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            yield line


def in_turns(
    work: Mapping[Key, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Seconds of each piece of work, taken in turns, so that a busy moment slows all of them alike."""
    seconds: dict[Key, list[float]] = {name: [] for name in work}
    for repeat in range(warm_up + repeats):
        for name, run in work.items():
            start = clock()
            run()
            if repeat >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def medians(
    work: Mapping[Key, Callable[[], object]],
    repeats: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """Median seconds of each piece of work, taken in turns."""
    return {name: statistics.median(values) for name, values in in_turns(work, repeats, warm_up, clock).items()}


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """The line of least squares; `r2` is the share of the variance it explains, None where any line fits."""
    slope, intercept = np.polyfit(x, y, 1)
    off, spread = np.asarray(y) - (slope * np.asarray(x) + intercept), np.asarray(y) - np.mean(y)
    r2 = 1 - float(off @ off) / float(spread @ spread) if len(x) > 2 else None
    return {"slope": float(slope), "intercept": float(intercept), "r2": r2}


def rounded(value: Any, digits: int = 4) -> Any:
    """The same figures with so many significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _script() -> str:
    """The name by which the script was started as a module."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    return spec.name


def write_result(name: str, figures: Mapping[str, Any], results: Path = RESULTS) -> Path:
    """Write figures with machine, date and command to `NAME-DATE.json` in the folder `results`, and print them."""
    now = datetime.now(UTC)
    asked = [*sys.argv[1:]]
    if "--results" in asked:  # where this is written to is no part of what was measured
        at = asked.index("--results")
        del asked[at : at + 2]
    command = " ".join(["python -m", _script(), *asked])
    result = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": machine(), **figures}
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=2, default=str) + "\n")
    print(json.dumps(figures, indent=2, default=str))
    print(f"written to {path}")
    return path


def _cpu_info(key: str) -> str:
    """What Linux says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return ""

"""Runs on a GPU: each replays on the CPU to its own fingerprint, and one that is killed ends as the one that is not.

    python -m bench.gpu.training [--device cuda] [--steps 6] [key=value ...]

The embedded model learns Countdown under each kind of weights; then `estune replay`, which sees no GPU, rebuilds the
last step from the journal and compares fingerprints: noise, update and rounding are the same bits on both. Then the
first run once more, killed (SIGKILL) in its middle and resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.gpu import accelerator

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.weights.device import chosen_device

VARIANTS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "base on the host": ("--base_device", "host"),
    "weights=copy": ("--weights", "copy", "--dtype", "bfloat16"),
    "bfloat16": ("--dtype", "bfloat16"),
    "rank one": ("--noise", "rank1"),
}
ESTUNE = (sys.executable, "-m", "estune.cli")


def train(run: Path, *arguments: str) -> float:
    """Seconds of a run, from its process's start to its end.

    Raises:
        EstuneError: it failed.
    """
    start = time.perf_counter()
    _finish(subprocess.Popen([*ESTUNE, "train", "--output_dir", str(run), *arguments]))
    return time.perf_counter() - start


def replays(run: Path, copy: Path) -> bool:
    """Whether the CPU rebuilds the run's last step to the fingerprint that its journal has."""
    command = [*ESTUNE, "replay", str(run), "-o", str(copy)]
    return subprocess.run(command, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode == 0


def killed_and_resumed(run: Path, steps: int, *arguments: str) -> None:
    """Begin a run, kill it once half of its steps are in the journal, and resume it."""
    process = subprocess.Popen([*ESTUNE, "train", "--output_dir", str(run), *arguments])
    while process.poll() is None and _steps(run) < steps // 2:
        time.sleep(0.05)
    if process.poll() is not None:
        raise EstuneError(f"{run}: ended before it could be killed; raise --steps")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _finish(subprocess.Popen([*ESTUNE, "train", "--resume", str(run)]))


def _steps(run: Path) -> int:
    try:
        return len(Journal.read(run).steps)
    except (EstuneError, OSError):  # not there yet
        return 0


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        command: Any = process.args
        raise EstuneError(f"{' '.join(map(str, command))} ended with {process.returncode}")


def main() -> None:
    """Run all, and write down how they went."""
    parser = options(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("overrides", nargs="*", help="settings of the runs, key=value")
    args = parser.parse_args()
    figures: dict[str, Any] = {"settings": settings(args), **accelerator(chosen_device(args.device))}
    # The engine is named: where vLLM is installed it would be tried, and each start of it takes a minute.
    common = ["--engine", "transformers", "--device", args.device, "--steps", str(args.steps)]
    common += [word for override in args.overrides for word in ("--" + override).split("=", 1)]
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        for name in args.variants:
            run = runs / name
            seconds = train(run, *common, *VARIANTS[name])
            figures[name] = {"seconds": seconds, "replays on the CPU": replays(run, runs / f"{name}, rebuilt")}
        first = args.variants[0]
        killed_and_resumed(runs / "killed", args.steps, *common, *VARIANTS[first])
        same = Journal.read(runs / "killed").fingerprint() == Journal.read(runs / first).fingerprint()
        figures["killed and resumed to the same bits"] = same
    write_result("gpu-training", rounded(figures), args.results)


if __name__ == "__main__":
    main()

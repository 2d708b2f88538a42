"""What it costs that all a run writes is on disk before it gets its name.

    python -m bench.faults.syncs [--repeats 20] [--folder DIR]

The completions of a step and a checkpoint of the embedded model are written with and without syncs, in turns, into a
folder of the disk that is to be measured (the temporary directory's by default). A step writes the completions of one
member, and a line of the journal, which was always synced.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import medians, options, rounded, settings, write_result

from estune import files
from estune.run.graded import write_completions
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate


def without_syncs(work: Callable[[], object]) -> Callable[[], object]:
    """The same work with nothing to wait for."""

    def run() -> None:
        sync, files.sync = files.sync, lambda path: None
        try:
            work()
        finally:
            files.sync = sync

    return run


def measure(repeats: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each."""
    rows = [{"prompt": "p" * 200, "completion": "c" * 400, "reward": 0.5, "tokens": 40} for _ in range(100)]
    base = Checkpoint(locate("tiny"))
    work: dict[str, Callable[[], object]] = {
        "completions of a step": lambda: write_completions(folder / "step.parquet", rows),
        "checkpoint of 3.5 MB": lambda: base.write(folder / "best", {}, "float32"),
    }
    plain = {f"{name}, no syncs": without_syncs(run) for name, run in work.items()}
    return {"seconds": medians(work | plain, repeats)}


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.repeats, Path(folder))
    write_result("syncs", {"settings": settings(args), **rounded(result)}, args.results)


if __name__ == "__main__":
    main()

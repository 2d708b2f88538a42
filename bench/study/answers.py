"""What a model answered to held-out questions before a run and after it, from the completions that the run kept.

    estune train --config examples/capitals.yaml --output_dir runs/capitals --threads 1 --replicas 1
    python -m bench.study.answers runs/capitals

Figures go to `answers-NAME-DATE.json`: each question with both answers, and whether they earn the first reward whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.parquet
from bench.common import RESULTS, write_result

from estune.config import read

KEPT = ("seed", "steps", "threads", "replicas")


def answers(run: Path) -> list[dict[str, Any]]:
    """A line for each held-out question: the first and the last evaluation's answer, and whether they are right."""
    first, *_, last = sorted((run / "completions").glob("evaluation-*.parquet"))
    before, after = (pyarrow.parquet.read_table(path).to_pylist() for path in (first, last))
    (right, *_) = (key for key in before[0] if key.startswith("rewards/"))
    return [
        {
            "question": one["prompt"],
            "before": one["completion"],
            "after": two["completion"],
            "right before": one[right] == 1.0,
            "right after": two[right] == 1.0,
        }
        for one, two in zip(before, after, strict=True)
    ]


def main() -> None:
    """Write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    config = read(arguments.run / "config.yaml")
    found = answers(arguments.run)
    figures = {
        "run": {key: config[key] for key in KEPT if config.get(key) is not None},
        "questions": len(found),
        **{key: sum(answer[key] for answer in found) for key in ("right before", "right after")},
        "answers": found,
    }
    write_result(f"answers-{arguments.run.name}", figures, arguments.results)


if __name__ == "__main__":
    main()

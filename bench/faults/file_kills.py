"""Runs that are killed just before a file event, against the same run undisturbed. (Linux)

    python -m bench.faults.file_kills [--kills 100] [--again 33] [--steps 6] [--seed 0]

A file event is a file below the run's folder that is opened to be written, renamed, removed, made or synced. The events
at which a run is killed are spread over all of its events. Of the runs so killed, `--again` are killed a second time
while they go on. Then each goes on to its end. Records in how many of them anything differs from the run that was left
alone: steps, evaluations, completions, `best`, `final`, checkpoints, and files that are too many.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench.common import options, settings, write_result
from tests.kills import differences, killed_at
from tests.models import save_model
from tests.runs import make_config


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs."""
    model = save_model(folder / "model")
    changes = {"steps": args.steps, "save_steps": 2, "eval_steps": 2, "report_to": []}
    events = killed_at(None, make_config(folder / "whole", model, **changes))
    assert events is not None
    chance = random.Random(args.seed)
    numbers = [round(i * (len(events) - 1) / max(1, args.kills - 1)) for i in range(args.kills)]
    twice = set(chance.sample(range(args.kills), min(args.again, args.kills)))
    log = []
    for number, event in enumerate(numbers):
        run = folder / "run"
        config = make_config(run, model, **changes)
        assert killed_at(event, config) is None
        second = chance.randrange(60) if number in twice else None
        if second is not None:
            killed_at(second, config)
        killed_at(None, config)
        log.append(
            {"event": event, "before": events[event], "second": second, "differs": differences(run, folder / "whole")}
        )
        shutil.rmtree(run)
    return {
        "events of a run": len(events),
        "kills": len(log),
        "of them killed again": len(twice),
        "kinds": dict(Counter(entry["before"].partition(" ")[0] for entry in log)),
        "runs that differ": sum(bool(entry["differs"]) for entry in log),
        "log": log,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--again", type=int, default=33)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    write_result("file_kills", {"settings": settings(args), **result}, args.results)


if __name__ == "__main__":
    main()

"""Runs whose power is cut, against the same run undisturbed. (Linux, root)

    python -m bench.faults.power_cuts [--cuts 10] [--steps 6]

The run lies on a file system of its own, ext4 on a loop device that writes nothing to its disk but what is synced. Just
before a file event (`bench.faults.file_kills`) it is stopped, and comes back with what is on the disk at that moment.
The moments are spread over all of its events. Records what the journal then says that there is and cannot be
used, and what differs in the end, after the run went on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench.common import options, settings, write_result
from tests.disks import Disk
from tests.kills import broken_promises, differences, killed_at, power_cut_at
from tests.models import save_model
from tests.runs import make_config


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs."""
    model, disk = save_model(folder / "model"), Disk(folder)
    changes = {"steps": args.steps, "save_steps": 2, "eval_steps": 2, "report_to": []}
    try:
        events = killed_at(None, make_config(folder / "whole", model, **changes))
        assert events is not None
        log = []
        for number in range(args.cuts):
            event = round((number + 1) * (len(events) - 1) / args.cuts)
            config = make_config(disk.path / "run", model, **changes)
            power_cut_at(event, config, disk)
            broken = broken_promises(disk.path / "run")
            killed_at(None, config)
            differs = differences(disk.path / "run", folder / "whole")
            log.append({"event": event, "before": events[event], "unusable": broken, "differs": differs})
            shutil.rmtree(disk.path / "run")
    finally:
        disk.close()
    return {
        "events of a run": len(events),
        "cuts": len(log),
        "runs with something unusable before they went on": sum(bool(entry["unusable"]) for entry in log),
        "runs that differ in the end": sum(bool(entry["differs"]) for entry in log),
        "log": log,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    write_result("power_cuts", {"settings": settings(args), **result}, args.results)


if __name__ == "__main__":
    main()

"""Monitors: what a run shows and writes while it goes on."""

from __future__ import annotations

from estune.config import Config
from estune.monitors.base import Monitor
from estune.run import RunDirectory


def default_monitors(run: RunDirectory, config: Config) -> list[Monitor]:
    """Console and `metrics.jsonl`, and the trackers named in `report_to`."""
    from estune.monitors.console import ConsoleMonitor
    from estune.monitors.files import JsonlMonitor, TensorBoardMonitor

    monitors: list[Monitor] = [ConsoleMonitor(), JsonlMonitor(run.metrics)]
    if "tensorboard" in config.report_to:
        monitors.append(TensorBoardMonitor(run.tensorboard))
    return monitors

"""Monitors: what a run shows and writes while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from estune.config import Config
from estune.run.directory import RunDirectory
from estune.run.monitors.base import Monitor

Monitors = Sequence[Monitor] | Callable[[RunDirectory, Config], Sequence[Monitor]]
"""Monitors, or what makes them for a run."""


def default_monitors(run: RunDirectory, config: Config) -> list[Monitor]:
    """Console, `metrics.jsonl` and model cards, and the trackers named in `report_to`.

    Raises:
        EstuneError: a tracker is not installed, or cannot begin a run.
    """
    from estune.run.monitors.card import CardMonitor
    from estune.run.monitors.console import ConsoleMonitor
    from estune.run.monitors.files import JsonlMonitor, TensorBoardMonitor
    from estune.run.monitors.trackers import TrackioMonitor, WandbMonitor

    check_trackers(config)
    monitors: list[Monitor] = [ConsoleMonitor(), JsonlMonitor(run.metrics), CardMonitor(run)]
    if "tensorboard" in config.report_to:
        monitors.append(TensorBoardMonitor(run.tensorboard))
    try:
        for tracker in (WandbMonitor, TrackioMonitor):
            if tracker.name in config.report_to:
                monitors.append(tracker(run, config))
    except BaseException:
        for monitor in monitors:
            monitor.close()
        raise
    return monitors


def check_trackers(config: Config) -> None:
    """Refuse trackers that are not installed.

    Raises:
        EstuneError: with what to install.
    """
    from estune.run.monitors.trackers import require

    for name in config.report_to:
        if name != "tensorboard":
            require(name)

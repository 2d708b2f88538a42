"""Monitors that write files: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from estune.files import replacing
from estune.run.monitors.base import Metrics, Monitor, Sample


class JsonlMonitor(Monitor):
    """One JSON object a line: each step's metrics, and each evaluation's (keys `eval_...`)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Append the metrics."""
        self._file.write(_line(metrics))
        self._file.flush()

    on_evaluate = on_step_end

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def rewrite_metrics(path: Path, all_metrics: Iterable[Metrics]) -> None:
    """Make the file hold just these metrics."""
    with replacing(path) as temporary:
        temporary.write_text("".join(map(_line, all_metrics)), encoding="utf-8")


def _line(metrics: Metrics) -> str:
    return json.dumps(dict(metrics)) + "\n"


class TensorBoardMonitor(Monitor):
    """TensorBoard scalars and sample completions."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric under its own name."""
        step = int(metrics["step"])
        for key, value in metrics.items():
            if key != "step":
                self._writer.add_scalar(key, value, step)

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric and a sample."""
        self.on_step_end(metrics, sample)
        self._writer.add_text("completion", f"{sample.prompt}\n\n**{sample.completion}**", int(metrics["step"]))

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()

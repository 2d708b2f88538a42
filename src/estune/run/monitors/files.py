"""Monitors that write files: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from estune.files import sync, write_text, writing
from estune.run.monitors.base import Metrics, Monitor, Sample, Summary


class JsonlMonitor(Monitor):
    """One JSON object a line: each step's metrics, and each evaluation's (keys `eval_...`)."""

    def __init__(self, path: Path) -> None:
        with writing(path):
            self._file = path.open("ab", buffering=0)
            self._path = path

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Append the metrics."""
        with writing(self._path):
            line = _line(metrics).encode()
            while line:
                line = line[self._file.write(line) :]

    on_evaluate = on_step_end

    def on_train_end(self, summary: Summary) -> None:
        """Have all on disk. Until then it is the journal that is, which resuming copies from."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def rewrite_metrics(path: Path, all_metrics: Iterable[Metrics]) -> None:
    """Make the file hold just these metrics."""
    write_text(path, "".join(map(_line, all_metrics)))


def _line(metrics: Metrics) -> str:
    return json.dumps(dict(metrics)) + "\n"


class TensorBoardMonitor(Monitor):
    """TensorBoard scalars and sample completions."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with writing(folder):
            self._writer = SummaryWriter(str(folder))
            self._folder = folder

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric under its own name."""
        step = int(metrics["step"])
        with writing(self._folder):  # a thread writes; what it met with comes up at the next call
            for key, value in metrics.items():
                if key != "step":
                    self._writer.add_scalar(key, value, step)

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric and a sample."""
        self.on_step_end(metrics, sample)
        self._writer.add_text("completion", f"{sample.prompt}\n\n**{sample.completion}**", int(metrics["step"]))

    def on_train_end(self, summary: Summary) -> None:
        """Have all on disk."""
        with writing(self._folder):
            self._writer.flush()
            for file in self._folder.iterdir():
                sync(file)

    def close(self) -> None:
        """Write what is pending."""
        with writing(self._folder):
            self._writer.close()

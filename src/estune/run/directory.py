"""A run's directory: what lies where, and who may begin or go on in it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from estune.config import Config
from estune.errors import EstuneError
from estune.files import make_folder, write_text
from estune.journal.journal import FILE, RESUME, TEMPORARY, going_on, is_run
from estune.journal.replay import replay
from estune.pool.waiting import told_while
from estune.weights.locate import hub_name, is_checkpoint, locate

RESUME_OWN = "Trainer.resume({text}, task=...)"
"""As `RESUME`, where the task was given from Python."""
BASE = "base"  # where a model that was given in memory lies in a run's directory


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
    def settings(self) -> Path:
        """The settings, as YAML."""
        return self.path / "config.yaml"

    @property
    def machine(self) -> Path:
        """The machine that the run began on, as JSON."""
        return self.path / "machine.json"

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
    def create(cls, path: Path) -> RunDirectory:
        """Make the directory of a new run.

        Raises:
            EstuneError: where the directory is in use.
        """
        refuse_used(path)
        make_folder(path)
        return cls(path)

    def discard(self) -> None:
        """Remove what `create` made and all that came after, of a run that could not begin."""
        for path in self.path.iterdir():
            if path.name != BASE:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def note_machine(self, machine: Mapping[str, Any]) -> None:
        """Keep what the run's speed is to be judged by, unless it is there: a start can be cut off before."""
        if not self.machine.is_file():
            write_text(self.machine, json.dumps(machine, indent=2) + "\n")

    def write_settings(self, config: Config) -> None:
        """Keep the settings, for people and for `--config`."""
        write_text(self.settings, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def refuse_used(path: Path, go_on: str = RESUME) -> None:
    """Refuse a directory that holds something.

    Args:
        path: the directory.
        go_on: what the user does to go on with a run, as `going_on` takes it.

    Raises:
        EstuneError: with what can be done.
    """
    if path.exists() and (not path.is_dir() or any(not _precedes(p.name) for p in path.iterdir())):
        held = "already holds a run" if (path / FILE).is_file() else "exists and is not empty"
        resume = f"go on with `{going_on(go_on, path)}`, " if (path / FILE).is_file() else ""
        raise EstuneError(f"output_dir {path} {held}: {resume}give another --output-dir, or remove it")


def how_to_go_on(config: Config, *, own_task: bool) -> str:
    """What a user does to go on with a run, as `going_on` takes it.

    Args:
        config: its settings. That a model's own code may run has to be said again.
        own_task: its task was given from Python.
    """
    if own_task:
        return RESUME_OWN.replace("...", "..., trust_remote_code=True") if config.trust_remote_code else RESUME_OWN
    return f"{RESUME} --trust_remote_code true" if config.trust_remote_code else RESUME


def _precedes(name: str) -> bool:
    """Whether a file can be there before there is a run: the model, or what a start that was cut off has left."""
    return name in (BASE, f".{BASE}.tmp", TEMPORARY) or name.lstrip(".").startswith("ancestor-")


def default_path(config: Config, task: str) -> Path:
    """Where a run goes that was given no `output_dir`."""
    model = config.model if config.model == "tiny" else Path(hub_name(config.model)[0]).name
    name = Path(task).stem if task.endswith(".py") else re.sub(r"[^\w.-]", "-", task)  # gym:sudoku has a colon
    return Path("runs") / f"{name}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_checkpoint(model_or_run: str) -> Path:
    """The checkpoint to evaluate: a run's best, else its final one, else the model itself."""
    found = _checkpoint(model_or_run)
    if found is None:
        how = going_on("estune replay {run} -o DIR", Path(model_or_run))
        raise EstuneError(f"{model_or_run} has no checkpoint yet; make one with `{how}`")
    return found


def checkpoint_to_serve(model_or_run: str, folder: Path, step: int | None = None) -> Path:
    """The same, or a run's after one of its steps; what a run has not, such as one in a file, is rebuilt in `folder`.

    Args:
        model_or_run: a run's directory, its journal in the compact form, or a model.
        folder: one that is there, which the checkpoint has to itself.
        step: how many of the run's steps to take; by default all, where it has no checkpoint.

    Raises:
        EstuneError: for a model or a step that is not there, or weights that do not match the journal.
    """
    found = _checkpoint(model_or_run) if step is None else None
    if found is not None:
        return found
    output = folder / "model"
    done = 0.0

    def hear(share: float) -> None:
        nonlocal done
        done = share

    with told_while("rebuilding weights from their journal", share=lambda: done):
        replay(Path(model_or_run), output, step, told=hear)
    return output


def _checkpoint(model_or_run: str) -> Path | None:
    run = RunDirectory(Path(model_or_run))
    if not is_run(run.path):
        return locate(model_or_run)
    places = (run.best, run.final, run.path)  # itself, where it was pulled from the hub
    return next((path for path in places if is_checkpoint(path)), None)

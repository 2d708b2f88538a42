"""A new run from where another one stood after some step, with other settings."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from estune.config import Config, merge, parse
from estune.journal.journal import Journal
from estune.run.monitors import Monitors
from estune.run.recorded import settings_of, task_folder
from estune.run.trainer import Trainer
from estune.run.trust import refuse_foreign
from estune.tasks.base import Task


def branch(
    run: str | Path,
    step: int | None = None,
    *,
    task: Task | None = None,
    monitors: Monitors | None = None,
    trust_task: bool = False,
    **changed: Any,
) -> Trainer:
    """A new run that begins with a run's weights after some step: what `start_from` and `start_step` set.

    Args:
        run: the run's directory, or its journal in the compact form; it stays as it is.
        step: after how many of its steps; all by default.
        task: a task of your own; by default the one of the run's settings, or of those that change.
        monitors: as `Trainer` takes them.
        trust_task: run the code that the journal names, which you have not run before.
        changed: settings that are to be others than the run's. `output_dir` is by default a new one.

    Returns:
        The new run, whose `train` takes its steps: `steps` of them, as many as the run's setting says by default.

    Raises:
        EstuneError: the run has no such step, a setting does not go on from there (how weights are kept), or the
            journal names code of others.
    """
    config, folder = branched(Path(run), step, changed, has_task=task is not None, trust_task=trust_task)
    with chdir(folder):
        return Trainer(config, task=task, monitors=monitors)


def branched(
    run: Path, step: int | None, changed: Mapping[str, Any], *, has_task: bool = False, trust_task: bool = False
) -> tuple[Config, Path]:
    """The settings of a branch, and the directory that paths in them are relative to."""
    journal = Journal.read(run, step)
    name = f"{run.resolve().stem}-{len(journal.steps)}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        **settings_of(journal),
        "model": journal.base_model(),
        "start_from": os.path.abspath(run),
        "start_step": len(journal.steps),
        "output_dir": Path("runs") / name,
    }
    config = parse(merge(settings, changed), str(run))
    assert config.output_dir is not None
    folder = task_folder(journal, config, changed)
    with chdir(folder):
        refuse_foreign(str(run), config, changed, has_task=has_task, trust=trust_task)
    return config.model_copy(update={"output_dir": Path(os.path.abspath(config.output_dir))}), folder

"""A run of the embedded model that measurements of workers share, and what must repeat of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estune.config import Config
from estune.journal.journal import Journal
from estune.run.trainer import Trainer


def trainer(folder: Path, steps: int, **changes: Any) -> Trainer:
    """A short run on Countdown; its steps take a second or two."""
    settings: dict[str, Any] = {
        "steps": steps,
        "population": 8,
        "prompts_per_step": 40,
        "eval_steps": 0,
        "task": {"name": "countdown", "eval_size": 40},
        "report_to": [],
        "log_completions": 0,
        "threads": 1,
        "device": "cpu",
    }
    return Trainer(Config(output_dir=folder, **{**settings, **changes}), monitors=[])


def substance(run: Path) -> list[Any]:
    """All of a run's steps but the times."""
    return [(r.update, r.rewards, r.prompts, r.fingerprint, r.sigma) for r in Journal.read(run).steps]

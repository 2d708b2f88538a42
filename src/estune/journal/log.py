"""A run as rows: what happened, in the order in which it did."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from estune.journal.journal import Journal
from estune.journal.records import StepRecord


def log(run: str | Path) -> list[dict[str, Any]]:
    """A run's steps and evaluations, in the order in which they happened.

    Args:
        run: its directory, or its journal in the compact form.

    Returns:
        Of each a row: its `kind`, `step` or `evaluation`; its `step`, counted from 1, or the number of steps before the
        evaluation; and all its metrics. A step's row has `members`, `sigma`, `learning_rate` and the `fingerprint` of
        the weights after it; of the members' rewards `reward` (their mean), `reward_std` and `reward_max`, which are
        None where no member has one; and `failed_members`, those that have none. The base is not one of them. An
        evaluation that took the run back has `back`, the number of steps left, and those that it took back `undone`.

    Raises:
        EstuneError: there is no journal, or it is damaged.
    """
    rows = []
    journal = Journal.read(Path(run))
    undone = journal.undone
    for event in journal.chronicle():
        metrics = {key: value for key, value in event.metrics.items() if key != "step"}
        if isinstance(event, StepRecord):
            taken_back = {"undone": True} if event.step in undone else {}
            rows.append({"kind": "step", "step": event.step + 1, **metrics, **_of_step(event), **taken_back})
        else:
            back = {} if event.back is None else {"back": event.back}
            rows.append({"kind": "evaluation", "step": event.step, **metrics, **back})
    return rows


def _of_step(record: StepRecord) -> dict[str, Any]:
    of_members = record.of_members
    rewards = [r for r in of_members if r is not None and math.isfinite(r)]
    return {
        "members": len(of_members),
        "failed_members": len(of_members) - len(rewards),
        "reward": statistics.fmean(rewards) if rewards else None,
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "reward_max": max(rewards, default=None),
        "sigma": record.sigma,
        "learning_rate": record.learning_rate,
        "fingerprint": record.fingerprint,
    }

"""How long completions are: as in an earlier run or probe, or by a distribution that stands in for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError, first_line

Lengths = npt.NDArray[np.float64]
"""Tokens of each of any number of completions, to draw from."""

SPREAD = 0.6
"""Standard deviation of the logarithm, where nothing is known but the mean: an assumption. The longest of 200 is then
some four times the mean, so that a batch has a tail."""
QUANTILES = 2000


def read_lengths(path: Path) -> Lengths:
    """The lengths of completions in a file.

    Args:
        path: a run's directory, or parquet of its completions, with a column `tokens`; what `estune probe --json`
            printed, or a list of numbers, as JSON; or a run's journal, which knows of every step the mean alone:
            lengths are then spread around the last one.

    Raises:
        EstuneError: there is no such file, or it tells no lengths.
    """
    try:
        found = np.asarray(_read(path), np.float64)
    # Beside what is no list of numbers: a whole number beyond all floats, and a list too deep to be read.
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise EstuneError(
            f"--lengths {path}: no lengths of completions can be read from it ({why}); give a run's directory, its "
            "journal or completions, what `estune probe --json` printed, or a JSON list of numbers"
        ) from error
    if found.ndim != 1 or not found.size or not np.all((found >= 1) & (found < math.inf)):
        raise EstuneError(f"--lengths {path}: lengths must be numbers from 1 on, at least one; found {found!s:.60}")
    return found


def spread_lengths(mean: float, most: float) -> Lengths:
    """Log-normal lengths with this mean, none beyond `most`; `SPREAD` is the standard deviation of the logarithm.

    Args:
        mean: from 1 to `most`; at `most` all have that length.
        most: `max_new_tokens`.
    """
    if mean >= most:
        return np.full(1, float(most))
    normal = NormalDist()
    shape = np.exp(SPREAD * np.array([normal.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]))
    low = 0.0
    high = most / shape[0]
    for _ in range(60):  # the mean of what is cut off at both ends rises with the scale
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * shape, 1, most).mean() < mean else (low, middle)
    found: Lengths = np.clip(high * shape, 1, most)
    return found


def _read(path: Path) -> Any:
    if path.is_dir():
        files = sorted((path / "completions").glob("step-*.parquet"))
        if not files:
            raise ValueError("it has no completions/step-*.parquet")
        return np.concatenate([_tokens(file) for file in files])
    if path.suffix == ".parquet":
        return _tokens(path)
    if path.suffix == ".jsonl":
        return _of_journal(path)
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["lengths"] if isinstance(found, dict) else found


def _tokens(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=["tokens"])["tokens"].to_numpy()


def _of_journal(path: Path) -> Lengths:
    from estune.journal.journal import FILE, Journal

    if path.name != FILE:
        raise ValueError(f"the journal of a run is called {FILE}")
    journal = Journal.read(path.parent)
    means = [m for step in journal.steps if (m := step.metrics.get("completions/mean_length")) is not None]
    if not means:
        raise ValueError("it has no step yet")
    return spread_lengths(means[-1], journal.settings["max_new_tokens"])

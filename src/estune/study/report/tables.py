"""The tables of completions that a run keeps, read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.errors import EstuneError
from estune.journal.records import EvaluationRecord

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of completions.

    Raises:
        EstuneError: it is not there, cannot be read, or is no such table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise EstuneError(f"{path.name} is not there")
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise EstuneError(f"{path.name} cannot be read") from error
    if rows and not {"prompt", "completion", "reward"} <= rows[0].keys():
        raise EstuneError(f"{path.name} has no columns prompt, completion and reward")
    return rows


def score_column(tables: Sequence[list[Row]], evaluations: Sequence[EvaluationRecord]) -> str | None:
    """The column whose mean is the recorded accuracy, or None."""
    for column in tables[0][0] if tables[0] else ():
        means = []
        for rows in tables:
            values = [row[column] for row in rows if row.get(column) is not None]
            means.append(statistics.fmean(values) if column.startswith("rewards/") and values else math.nan)
        accuracies = [e.metrics.get("eval_accuracy", math.nan) for e in evaluations]
        if all(math.isclose(m, a, abs_tol=1e-9) for m, a in zip(means, accuracies, strict=True)):
            return str(column)
    return None

"""What reward functions log: it is kept with the completions, and added up to metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.convention import Log, weighted
from estune.grading.grading import grade
from estune.run.graded import grade_completions, step_metrics, write_completions
from tests.grading.functions import COMPLETIONS, ROWS, task_of


def test_what_functions_log_goes_to_records_and_metrics(tmp_path: Path) -> None:
    def logs(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("extracted", [text if text.isdigit() else 7 for text in completions])
        log_metric("depth", 1.0)
        log_metric("depth", 2.0)
        return [1.0] * len(completions)

    task = task_of([logs])
    graded = grade_completions(task, task.train, COMPLETIONS)
    assert graded.metrics()["depth"] == 1.5
    write_completions(tmp_path / "some.parquet", graded.records(step=1))
    table = pyarrow.parquet.read_table(tmp_path / "some.parquet").to_pydict()
    assert table["extracted"] == ["1", "7", "3"]  # values of two types: a text each
    assert table["step"] == [1, 1, 1]


def test_numbers_that_cannot_be_added_up_count_as_infinite() -> None:
    def huge(log_metric: Any, **_: Any) -> list[float]:
        log_metric("depth", 1e308)
        log_metric("depth", 2.0)
        return [1e308, -1e308, 1e100]

    task = task_of([huge])
    graded = grade_completions(task, task.train, COMPLETIONS)
    assert graded.grades.scores == {"huge": [math.inf, -math.inf, 1e100]}
    assert (graded.grades.mean, graded.metrics()["depth"]) == (None, 2.0)
    assert math.isnan(weighted([1.0, 1.0], [1e308, 1e308]) or 0.0)


@pytest.mark.parametrize("value", [{}, [{}], 10**20, "\ud800", {"a": {}}, "\x00"])
def test_whatever_is_logged_can_be_written(value: Any, tmp_path: Path) -> None:
    write_completions(tmp_path / "some.parquet", [{"step": 1, "note": value}, {"step": 1, "note": value}])
    table = pyarrow.parquet.read_table(tmp_path / "some.parquet").to_pydict()
    assert table == {"step": [1, 1], "note": [str(value).replace("\ud800", "?")] * 2}


def test_names_of_what_is_logged_move_no_cursor() -> None:
    log = Log(1)
    log.extra("a\x1b[2J", [1])
    log.metric("b\x1b[2J", 1)
    assert (log.extras, log.metrics) == ({"a?[2J": [1]}, {"b?[2J": [1.0]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda extra, metric: extra("note", [1]), "1 values for 3 completions"),
        (lambda extra, metric: extra("reward", [1] * 3), "a column of estune's own"),
        (lambda extra, metric: metric("reward", 1.0), "estune's own metrics"),
        (lambda extra, metric: metric("eval_depth", 1.0), "estune's own metrics"),
        (lambda extra, metric: metric("depth", "deep"), "could not convert string to float"),
    ],
)
def test_bad_logging_is_refused(call: Any, message: str) -> None:
    def logs(log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        call(log_extra, log_metric)
        return [1.0] * 3

    with pytest.raises(EstuneError, match=message):
        grade([logs], [1.0], ROWS, COMPLETIONS)


def test_totals_are_added_up_over_a_batch_and_a_step() -> None:
    def paid(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        for text in completions:
            log_metric("tokens", len(text), total=True)
            log_metric("length", len(text))
        return [0.0] * len(completions)

    members = [[*COMPLETIONS[:2], Completion(text, [1], True)] for text in ("four", "five5")]
    task = task_of([paid])
    graded = [grade_completions(task, ROWS, member) for member in members]
    assert [g.metrics()["rewards/paid/tokens"] for g in graded] == [6, 7]
    metrics = step_metrics(graded)
    assert metrics["rewards/paid/tokens"] == 13
    assert metrics["length"] == pytest.approx(13 / 6)

    def taken(log_metric: Any, **_: Any) -> list[float]:
        log_metric("errors", 1, total=True)
        return [0.0] * 3

    with pytest.raises(EstuneError, match="estune's own metrics are called so"):
        grade([taken], [1.0], ROWS, COMPLETIONS)

"""`estune eval`: the figures of training again, of runs and of models, on other data where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from estune.config import parse
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.evaluate import evaluate_model
from estune.run.held_out import pass_metrics
from estune.tasks import CountdownConfig
from estune.tasks.preflight import FULL_MARKS
from tests.command_line import SMALL, estune, refused, usage
from tests.runs import make_task


def of_training(run: Path, metrics: dict[str, float], step: int | None = None) -> Any:
    """What the run recorded of these metrics, at its best evaluation or the one after `step`."""
    evaluations = Journal.read(run).evaluations
    chosen = max(evaluations, key=lambda e: e.metrics["eval_accuracy"] if step is None else e.step == step)
    assert {"eval_accuracy", "eval_reward", "eval_completions/mean_length"} <= metrics.keys()
    return pytest.approx({key: chosen.metrics[key] for key in metrics})


def test_eval_of_a_run_and_of_a_model_agree_with_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = evaluate_model(str(run))
    assert best == of_training(run, best)
    before = evaluate_model("tiny", overrides=["task.train_size=40", "task.eval_size=20"])
    assert before == of_training(run, before, step=0)
    capsys.readouterr()
    assert estune("eval", run, "-o", tmp_path / "completions.parquet") == 0
    out = capsys.readouterr().out
    assert f"{best['eval_accuracy']:.4f}" in next(line for line in out.splitlines() if " accuracy " in line)
    assert (tmp_path / "completions.parquet").exists()


def test_eval_of_a_run_changes_what_it_is_told_and_no_more(run: Path, tmp_path: Path) -> None:
    same = evaluate_model(str(run), overrides=["top_k=3"])  # which greedy decoding does not use
    assert same == of_training(run, same)
    (tmp_path / "more.yaml").write_text("top_p: 0.5\n")
    assert evaluate_model(str(run), tmp_path / "more.yaml") == same

    evaluate_model(str(run), overrides=["task.eval_size=10", "max_new_tokens=3"], output=tmp_path / "few.parquet")
    few = pyarrow.parquet.read_table(tmp_path / "few.parquet").to_pylist()
    whole = pyarrow.parquet.read_table(run / "completions" / "evaluation-00000.parquet").to_pylist()
    assert [row["prompt"] for row in few] == [row["prompt"] for row in whole[:10]]
    assert {row["tokens"] for row in few} == {3}


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="evaluates a run of a device that is not here")
def test_eval_of_a_run_of_another_machine_takes_the_device_there_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = evaluate_model(str(run)), Journal.read

    def elsewhere(path: Path) -> Journal:
        journal = read(path)
        journal.settings["device"] = "mps"
        return journal

    monkeypatch.setattr(Journal, "read", elsewhere)
    assert evaluate_model(str(run)) == expected
    with pytest.raises(EstuneError, match="device: 'mps' is not available"):
        evaluate_model(str(run), overrides=["device=mps"])


def test_eval_of_a_run_on_other_data_is_refused_unless_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"numbers": [a, a + b], "target": 2 * a + b} for a in range(1, 20) for b in range(5)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    options = [o for o in SMALL if not o.startswith("--task")]
    assert estune("train", *options, "--task.data", data, "--steps=1", "--output-dir", tmp_path / "r") == 0
    assert estune("eval", tmp_path / "r") == 0
    assert estune("eval", tmp_path / "r", "--seed", 5) == 0
    data.write_text(json.dumps(rows[:-10]))
    assert "are not those that the run was trained on" in refused(capsys, "eval", tmp_path / "r")
    assert estune("eval", tmp_path / "r", "--task.data", data) == 0


def test_eval_of_a_run_on_generated_problems_takes_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [{"numbers": [101 + n, 200 + n], "target": 301 + 2 * n} for n in range(5)]
    data, output = tmp_path / "data.json", tmp_path / "completions.parquet"
    data.write_text(json.dumps(problems))
    assert estune("eval", run, "--temperature", 0.7, "--task.eval_data", data, "-o", output) == 0
    assert len(pyarrow.parquet.read_table(output)) == 5

    config = parse(Journal.read(run).settings)
    seen = config.task.build(config.seed).train[0]
    data.write_text(json.dumps([*problems, {key: seen[key] for key in ("numbers", "target")}]))
    assert "1 of 6 evaluation examples are in the training set too" in refused(
        capsys, "eval", run, "--task.eval_data", data
    )


def test_a_run_on_a_task_of_ones_own_is_evaluated_from_python(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the task variety, not countdown: if it is your own, evaluate it from Python" in refused(capsys, "eval", own)
    assert "the task variety, not countdown" in refused(capsys, "eval", own, "--task.eval_size", 5)
    metrics = evaluate_model(str(own), task=make_task())
    assert metrics == of_training(own, metrics)


def test_eval_draws_several_completions_and_watches_other_tasks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.parquet"
    options = ["--eval_samples", 4, "--eval_temperature", 0.8, "--max_new_tokens", 6]
    assert estune("eval", run, *options, "--watch", "conciseness", "-o", file) == 0
    out = capsys.readouterr().out
    for name in ("accuracy", "mean@4", "pass@1", "pass@4", "watch/conciseness/accuracy", "watch/conciseness/pass@2"):
        assert f" {name} " in out
    assert "eval_" not in out
    rows = pyarrow.parquet.read_table(file).to_pylist()
    ours = [row for row in rows if row["task"] == "countdown"]
    assert len(ours) == 20 * 4
    assert {row["task"] for row in rows} == {"countdown", "conciseness"}
    assert len({row["completion"] for row in ours[:4]}) > 1
    metrics = evaluate_model(str(run), None, [f"{k[2:]}={v}" for k, v in zip(options[::2], options[1::2], strict=True)])
    (told,) = CountdownConfig(train_size=40, eval_size=20).build(0).accuracies
    assert metrics.items() >= pass_metrics([row[f"rewards/{told}"] >= FULL_MARKS for row in ours], 4).items()


def test_mistakes_of_eval_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no task is called 'chess'" in refused(capsys, "eval", run, "--watch", "chess")
    assert "no such directory" in refused(capsys, "eval", "./nowhere")
    assert "Missing argument 'model'" in usage(capsys, "eval")
    assert "No such command 'trian'" in usage(capsys, "trian")
    assert usage(capsys, "resume", "run").endswith("A run goes on by `estune train --resume RUN`.")
    assert "No such option" in usage(capsys, "tasks", "--wide")
    assert "no such file" in refused(capsys, "train", "-c", "nowhere.yaml")

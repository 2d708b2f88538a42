"""The commands about journals, as a user gives them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord
from tests.command_line import SMALL, estune, refused


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, task in (("a", "countdown"), ("b", "conciseness")):
        options = ["--task.name", task, "--task.train_size=40", "--task.eval_size=20", *SMALL[:3]]
        assert estune("train", *options, "--seed", len(name + task), "--output-dir", folder / name) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert estune(*arguments) == 0
    return capsys.readouterr().out


def test_log(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal.read(runs / "a")
    out = said(capsys, "log", runs / "a")
    assert journal.fingerprint() in out
    rows = [json.loads(line) for line in said(capsys, "log", runs / "a", "--json").splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2]
    assert rows[-1]["eval_accuracy"] == journal.evaluations[-1].metrics["eval_accuracy"]
    table = list(csv.DictReader(io.StringIO(said(capsys, "log", runs / "a", "--csv"))))
    assert [row["fingerprint"] for row in table if row["kind"] == "step"] == [r.fingerprint for r in journal.steps]
    assert float(table[1]["reward"]) == rows[1]["reward"]


def test_the_log_marks_what_was_taken_back(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    journal = Journal.resume(tmp_path / "a")
    journal.append_evaluation(EvaluationRecord(2, {"eval_accuracy": 0.0}, back=1))
    journal.close()
    lines = said(capsys, "log", tmp_path / "a").splitlines()
    assert [line.split()[:2] for line in lines if line.endswith("taken back")] == [["step", "2"]]
    assert [line.split()[:2] for line in lines if line.endswith("back to step 1")] == [["evaluation", "2"]]


def test_verify_says_what_is_proven_and_what_is_not(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "verify", runs / "b")
    assert "3 recorded fingerprints" in out
    assert "final/: the weights after step 2, to the bit" in out
    assert "not proven by this" in out
    assert Journal.read(runs / "b").sha256() in out
    shutil.copytree(runs / "b", tmp_path / "b")
    (tmp_path / "b" / "final" / "config.json").write_text("{}")
    assert "final is not the checkpoint that the run saved" in refused(capsys, "verify", tmp_path / "b")
    assert "is not signed" in refused(capsys, "verify", runs / "b", "--signed-by", "key.pub")


def test_diff(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "diff", runs / "a", runs / "b")
    assert "task.name" in out
    assert "the first that is another is step 1, in members" in out
    assert "cosine" in out
    assert "the same" in said(capsys, "diff", runs / "a", runs / "a", "--no-weights")
    found = json.loads(said(capsys, "diff", runs / "a", runs / "b", "--json"))
    assert found["settings"]["task.name"] == ["countdown", "conciseness"]
    assert found["layers"][-1]["layer"] == "all"


def test_branch(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "branch", runs / "a", "--step", 1, "--steps=1", "--sigma", 0.02, "--output-dir", tmp_path / "c")
    journal = Journal.read(tmp_path / "c")
    assert journal.header.fingerprint == Journal.read(runs / "a").steps[0].fingerprint
    assert journal.steps[0].sigma == 0.02
    assert "has 2 steps, not 3" in refused(capsys, "branch", runs / "a", "--step", 3)
    assert "did you mean sigma?" in refused(capsys, "branch", runs / "a", "--sigmas", 3)


def test_merge_shows_interference_and_evaluates_on_both_tasks(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, "merge", runs / "a", runs / "b", "--weights", "1,0.5", "-o", tmp_path / "ab")
    assert "cosine of the two changes" in out
    for name in ("a", "b"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"{runs / name}: accuracy")]
        assert len(line.split()) == 4
    assert len(Journal.read(tmp_path / "ab").steps) == 4
    assert "5 recorded fingerprints" in said(capsys, "verify", tmp_path / "ab")
    assert "no list of numbers" in refused(
        capsys, "merge", runs / "a", runs / "b", "--weights", "1,x", "-o", tmp_path / "x"
    )


def test_pack_and_what_takes_a_file_for_a_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.estune"
    assert f"{file}: " in said(capsys, "pack", runs / "a", "-o", file)
    assert "3 recorded fingerprints" in said(capsys, "verify", file)
    assert "verified" in said(capsys, "replay", file, "-o", tmp_path / "model")
    assert "has no checkpoint yet" in refused(capsys, "eval", file)
    assert "does not grow" in refused(capsys, "train", "--resume", file)

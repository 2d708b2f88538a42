"""The command line as a user meets it, on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from estune import cli
from estune.journal import Journal
from tests.models import build_model, build_tokenizer, save_model

SMALL = ["--steps=2", "--population=4", "--prompts_per_step=8", "--task.train_size=40", "--task.eval_size=20"]


def estune(*arguments: Any) -> int:
    """Run a command in this process; its exit code."""
    before = sys.argv
    sys.argv = ["estune", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a refused command says: exit code 1 and one line."""
    capsys.readouterr()
    assert estune(*arguments) == 1
    error = capsys.readouterr().err.strip()
    (line,) = [text for text in error.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in error
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert estune("train", *SMALL, "--output-dir", folder) == 0
    return folder


def test_train_says_what_improved_and_where_everything_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    assert estune("train", *SMALL, f"--output-dir={folder}") == 0
    out = capsys.readouterr().out
    assert "held-out accuracy" in out
    for name in ("best", "final", "journal.jsonl", "metrics.jsonl", "tensorboard", "completions"):
        assert (folder / name).exists()
        assert name in out
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 2


def test_a_run_from_a_config_file(tmp_path: Path, run: Path) -> None:
    settings = Journal.read(run).header.config
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(settings))
    assert estune("train", "--config", tmp_path / "again.yaml", "--output-dir", tmp_path / "again") == 0
    assert Journal.read(tmp_path / "again").fingerprint() == Journal.read(run).fingerprint()


def test_resume_and_replay(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", *SMALL, "--steps=1", "--output-dir", tmp_path / "short") == 0
    assert estune("train", "--resume", tmp_path / "short", "--steps", 2) == 0
    # The embedded model's schedule refers to the whole run, so only a run of the same length is the same run.
    assert len(Journal.read(tmp_path / "short").steps) == 2
    capsys.readouterr()
    assert estune("replay", run, "--step", 1, "-o", tmp_path / "one", "--dtype", "bfloat16") == 0
    assert "verified" in capsys.readouterr().out
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as f:
        assert {str(f.get_tensor(k).dtype) for k in f.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_eval_of_a_run_and_of_a_model_agree_with_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from estune.commands import evaluate_model

    journal = Journal.read(run)
    best = max(journal.evaluations, key=lambda e: e.metrics["eval_accuracy"]).metrics
    assert evaluate_model(str(run)) == pytest.approx(best)
    before = evaluate_model("tiny", overrides=["task.train_size=40", "task.eval_size=20"])
    assert before == pytest.approx(journal.evaluations[0].metrics)
    assert evaluate_model(str(run), overrides=["task.eval_size=10"]) != pytest.approx(best)
    capsys.readouterr()
    assert estune("eval", run, "-o", tmp_path / "completions.parquet") == 0
    assert "eval_accuracy" in capsys.readouterr().out
    assert (tmp_path / "completions.parquet").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, "--output-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert "40 training and 20 held-out rows" in out
    assert "2 steps x 4 members x 8 prompts = 64 completions" in out
    assert not list(tmp_path.iterdir())
    assert "no such directory" in refused(capsys, "train", "--dry-run", "--model", "./nowhere")


def test_help_is_quick_and_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "estune.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "replay", "settings"):
        assert command in done.stdout


def test_settings_lists_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    from estune.config import Config

    assert estune("settings") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in Config.model_fields)
    assert "task.eval_size" in out


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean sigma?" in refused(capsys, "train", "--sigmas", 1)
    assert "found 0" in refused(capsys, "train", "--sigma", 0)
    assert "unexpected argument" in refused(capsys, "train", "sigma")
    assert "--resume keeps the run's settings" in refused(capsys, "train", "--resume", run, "--sigma", 1)
    assert "already holds a run" in refused(capsys, "train", *SMALL, "--output-dir", run)
    assert "this is no run" in refused(capsys, "train", "--resume", tmp_path)
    assert "this is no run" in refused(capsys, "replay", tmp_path, "-o", tmp_path / "x")
    assert "no such directory" in refused(capsys, "eval", tmp_path / "none")


def test_data_that_cannot_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.json"

    def complaint(rows: Any) -> str:
        data.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return refused(capsys, "train", "--task.data", data, "--task.eval_data", data, "--output-dir", tmp_path / "r")

    good = {"numbers": [1, 2, 3], "target": 6}
    assert "no such file" in refused(capsys, "train", "--task.data", tmp_path / "none.json")
    assert str(data) in complaint([])
    assert "target" in complaint([{"numbers": [1, 2]}])
    assert "row 2" in complaint([good, {**good, "target": "many"}])
    assert "training set too" in complaint([good])
    assert str(data) in complaint("{not json")
    assert not (tmp_path / "r").exists()


def test_models_that_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(model: Path) -> str:
        return refused(capsys, "train", *SMALL, "--model", model, "--output-dir", tmp_path / "r")

    (tmp_path / "empty").mkdir()
    assert "without config.json" in complaint(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("x")
    assert "is a file" in complaint(tmp_path / "text.txt")
    broken = save_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert "not a safetensors file" in complaint(broken)
    build_model("qwen2").save_pretrained(tmp_path / "mute")
    assert "tokenizer" in complaint(tmp_path / "mute")
    short = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    assert "max_new_tokens" in complaint(short)
    assert not (tmp_path / "r").exists()


def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "estune.cli", "train", *SMALL, "--output-dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ})
    assert "held-out accuracy" in done.stdout
    assert done.stderr == ""

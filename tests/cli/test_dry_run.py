"""`estune train --dry-run`: what it shows, what it refuses, and that it writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from estune.config import Config
from estune.run.dry_run import describe
from tests.command_line import SMALL, estune, refused
from tests.models import build_model, build_tokenizer, save_model


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, "--output-dir", tmp_path / "r") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith(": look at tiny on countdown, and train nothing")
    assert "40 training and 20 held-out rows" in out
    assert "2 steps x 4 members x 8 prompts = 64 completions" in out
    assert re.search(r"\na step: at most [\d,]+ tokens, .*not measured\)\n", out)
    assert not list(tmp_path.iterdir())
    assert "no such directory" in refused(capsys, "train", "--dry-run", "--model", "./nowhere")


def test_time_is_that_of_the_task_s_own_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{"x" * n}"}}\n' for n in range(1, 41)))
    (tmp_path / "graders.py").write_text("def brief(completions, **_):\n    return [0.0] * len(completions)\n")
    model = save_model(tmp_path / "model", tokenizer=build_tokenizer(chat=False))
    task = {"name": "custom", "data": str(tmp_path / "rows.jsonl"), "rewards": [f"{tmp_path}/graders.py:brief"]}
    found = describe(Config(model=str(model), task=task, max_new_tokens=8, output_dir=tmp_path / "run"))
    held_out = int(re.search(r"(\d+) held-out rows", found.text)[1])  # type: ignore[index]
    assert 0 < found.held_out == held_out < 40
    assert 15 < found.prompt_tokens < 26  # a token for each x: 1 to 40, without those that are held out
    assert not found.in_turns
    assert estune("train", "--dry-run", *SMALL, "--task", "countdown-turns") == 0
    assert "not measured, one turn a rollout)\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--output-dir", "2026-01-01"], ["--report_to", "tensorboard"]])
def test_options_are_taken_as_they_are_typed(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, *options) == 0
    assert options[1] in capsys.readouterr().out


def test_dry_run_refuses_what_training_would(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    build_model("qwen2").save_pretrained(tmp_path / "mute")
    for options, message in [
        (["--output-dir", run], "already holds a run"),
        (["--output-dir", tmp_path], "exists and is not empty"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "cuda:99"], "'cuda:99' is not available"),
        (["--train_parameters", "nothing.*"], "'nothing.*'"),
        (["--sigma_scale", '{"nothing.*": 2}'], "'nothing.*'"),
        (["--model", short, "--max_new_tokens", 60], "64 positions"),
        (["--model", tmp_path / "mute"], "tokenizer"),
    ]:
        dry = refused(capsys, "train", "--dry-run", *SMALL, "--output-dir", tmp_path / "r", *options)
        assert message in dry
        assert message in refused(capsys, "train", *SMALL, "--output-dir", tmp_path / "r", *options)
    assert not (tmp_path / "r").exists()


GRADER = """
def right(prompts, completions, answer, **_):
    return [float(gold in text + prompt) for prompt, text, gold in zip(prompts, completions, answer, strict=True)]

def wrong(completions, **_):
    return [text["content"] for text in completions]
"""


@pytest.mark.parametrize("chat", [True, False])
def test_dry_run_shows_what_model_and_rewards_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "say {n}", "answer": "42"}}\n' for n in range(40)))
    (tmp_path / "grader_of_dry_runs.py").write_text(GRADER)
    data = ["--task", "custom", "--task.data", tmp_path / "rows.jsonl", "--task.rewards"]
    grader = tmp_path / "grader_of_dry_runs.py"
    settings = ["--task.chat", str(chat).lower(), "--prompts_per_step", 100]
    assert estune("train", "--dry-run", *data, f"{grader}:right", *settings) == 0
    out = capsys.readouterr().out
    _, _, shown = out.partition("as the model is shown it:\n")
    assert shown.startswith("  <|im_start|>user\n  say 0<|im_end|>\n  <|im_start|>assistant\n" if chat else "  say 0\n")
    assert "  prompts = ['say 0']\n  completions = ['The answer is 42.']\n" in shown
    assert "  right: 1.0\n  in all: 1.0\n" in shown
    assert "note: prompts_per_step is 100, and the training set has " in shown
    said = refused(capsys, "train", "--dry-run", *data, f"{grader}:wrong", *settings)
    assert "reward wrong raised TypeError" in said


def test_dry_run_refuses_an_engine_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("estune.engines.vllm.internals.PACKAGES", ("no-such-package-as-this",))
    assert "vLLM is not installed; pip install" in refused(capsys, "train", "--dry-run", *SMALL, "--engine", "vllm")


def test_dry_run_does_not_guess_what_a_cluster_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("train", "--dry-run", *SMALL, "--workers", 2, "--ray_address", "auto") == 0
    assert "\nengine vllm, if the cluster has GPUs" in capsys.readouterr().out


def test_dry_run_counts_positions_for_training_prompts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"numbers": [1, 2], "target": 3, "context": "x" * 100}
    (tmp_path / "train.json").write_text(json.dumps([long]))
    (tmp_path / "eval.json").write_text(json.dumps([{**long, "target": 2, "context": "x"}]))
    model = save_model(tmp_path / "short", tokenizer=build_tokenizer(), max_position_embeddings=64)
    data = ["--task.data", tmp_path / "train.json", "--task.eval_data", tmp_path / "eval.json"]
    line = refused(capsys, "train", "--dry-run", "--model", model, "--max_new_tokens", 10, *data)
    assert "100 tokens and max_new_tokens 10 go beyond the 64 positions" in line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_of_resuming_tells_what_is_left_and_writes_nothing(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    assert estune("train", *SMALL, "--save_steps=1", "--output-dir", folder) == 0
    before = contents(folder)
    capsys.readouterr()
    assert estune("train", "--resume", folder, "--steps", 5, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"run {folder}: 2 of 5 steps done, 3 to go" in out
    assert "begins with checkpoint-2 and replays 0 steps" in out
    assert re.search(r"\na step: at most [\d,]+ tokens, about .*; the run: about .* \(as the last steps took", out)
    assert "40 training and 20 held-out rows" in out
    assert estune("train", "--resume", folder, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "2 of 2 steps done, 0 to go" in out
    assert "a step: " not in out
    assert contents(folder) == before
    assert "this is no run" in refused(capsys, "train", "--dry-run", "--resume", tmp_path)
    line = refused(capsys, "train", "--dry-run", "--resume", own)
    assert "the task variety, not countdown" in line
    assert "Trainer.resume(run, task=...), or with the ESTrainer that began it" in line

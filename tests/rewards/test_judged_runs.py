"""Runs that a judge rewards: begun, resumed, evaluated, and what is said before they begin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estune.cli.options import overrides_of
from estune.config import Config, load
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.dry_run import describe
from estune.run.evaluate import evaluate_model
from estune.run.trainer import Trainer
from tests.command_line import refused
from tests.judges import KEY, Served
from tests.runs import make_config


def data(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} and ", "gold": "x"}) + "\n" for n in range(60)))
    return file


def options(served: Served, folder: Path) -> list[str]:
    """What a user types."""
    (folder / "rubric.md").write_text("Good completions say yes.\n")
    return [
        *("--task", "custom", "--task.data", str(data(folder)), "--task.eval-size", "3", "--task.chat", "false"),
        *("--task.judge.base_url", served.url, "--task.judge.model", "m", "--task.judge.rubric"),
        *(str(folder / "rubric.md"), "--task.judge.columns", "gold", "--task.judge.cache", str(folder / "cache")),
        *("--task.judge.request.max_tokens", "9", "--task.judge.api_key_env", "MY_KEY"),
    ]


def settings(served: Served, folder: Path, *more: str) -> Config:
    return load(overrides=overrides_of([*options(served, folder), *more]))


def test_a_run_is_judged_resumed_and_evaluated(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    config = settings(served, tmp_path)
    small = make_config(tmp_path / "run", Path("tiny"), steps=2, task=config.task, threads=1)
    Trainer(small, monitors=[]).train()
    assert served.bodies[-1]["max_tokens"] == 9
    journal = Journal.read(tmp_path / "run")
    assert journal.evaluations[0].metrics["eval_rewards/judge/requests"] == 3
    asked = journal.steps[0].metrics
    assert asked["rewards/judge/requests"] + asked["rewards/judge/cached"] == 24
    assert "eval_accuracy" in journal.evaluations[-1].metrics
    assert all(KEY not in file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*") if file.is_file())
    Trainer.resume(tmp_path / "run", monitors=[], steps=3).train()
    metrics = evaluate_model(str(tmp_path / "run"))
    assert "eval_rewards/judge/cached" in metrics
    (tmp_path / "rubric.md").write_text("Another.\n")
    with pytest.raises(EstuneError, match="reward judge"):
        Trainer.resume(tmp_path / "run", monitors=[], steps=4)


def test_a_judge_that_a_foreign_journal_names_is_not_asked(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "theirs"))
    config = settings(served, tmp_path)
    Trainer(make_config(tmp_path / "run", Path("tiny"), steps=1, task=config.task, threads=1), monitors=[]).train()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "ours"))
    served.bodies.clear()
    for act in (evaluate_model, lambda run: Trainer.resume(run, steps=2)):
        with pytest.raises(EstuneError, match=r"a judge, m at http\S+, which would be sent .* key in MY_KEY .*trust"):
            act(str(tmp_path / "run"))
    assert served.bodies == []
    evaluate_model(str(tmp_path / "run"), trust_task=True)
    evaluate_model(str(tmp_path / "run"))


def test_a_judge_that_is_not_there_is_said_before_anything_is_written(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Served("http://127.0.0.1:9/v1")
    said = refused(capsys, "train", *options(gone, tmp_path), "--output-dir", str(tmp_path / "run"))
    assert "reward judge did not reach model m at http://127.0.0.1:9/v1/ (" in said
    assert "start its server, or set base_url" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(EstuneError, match="did not reach"):
        describe(settings(gone, tmp_path))
    served.next = [401]
    with pytest.raises(EstuneError, match=r"refused by .*; put a key into the environment variable MY_KEY"):
        describe(settings(served, tmp_path))
    assert "judge: 0.0" in describe(settings(served, tmp_path)).text


def test_a_file_names_a_judge(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "judged.py"
    file.write_text(
        "from estune.rewards.judge import Judge\n"
        'train = [{"prompt": f"{n} and "} for n in range(40)]\n'
        f"rewards = [Judge(base_url={served.url!r}, model='m', rubric='Say yes.', name='kind', cache=None)]\n"
    )
    config = make_config(tmp_path / "run", Path("tiny"), steps=1, task=str(file), threads=1)
    Trainer(config, monitors=[]).train()
    assert Journal.read(tmp_path / "run").steps[0].metrics["rewards/kind/requests"] > 0


def test_tasks_of_a_mix_may_have_a_judge(served: Served, tmp_path: Path) -> None:
    tasks = {"a": settings(served, tmp_path).task, "b": {"name": "conciseness", "train_size": 20, "eval_size": 3}}
    config = make_config(tmp_path / "run", Path("tiny"), steps=1, task={"name": "mix", "tasks": tasks}, threads=1)
    Trainer(config, monitors=[]).train()
    metrics = Journal.read(tmp_path / "run").evaluations[0].metrics
    assert metrics["eval_rewards/a/judge/requests"] + metrics["eval_rewards/a/judge/cached"] == 3

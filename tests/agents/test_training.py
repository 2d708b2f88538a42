"""Runs whose rows are played: the same to the bit on any number of replicas, and on from where they were cut off."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from estune.config import load
from estune.errors import EstuneError
from estune.grading.rollout import Rollout
from estune.journal.journal import Journal
from estune.pool import open as opening
from estune.run.trainer import Trainer

SETTINGS = ("task=countdown-turns", "task.eval_size=16", "population=4", "prompts_per_step=12", "eval_steps=2")
ROOT = Path(__file__).parents[2]


def train(output: Path, *settings: str) -> Journal:
    Trainer(load(None, [*SETTINGS, "report_to=none", f"output_dir={output}", *settings])).train()
    return Journal.read(output)


def test_a_run_of_two_tries_is_the_same_on_two_replicas_and_when_resumed(tmp_path: Path) -> None:
    whole = train(tmp_path / "one", "steps=2", "replicas=1")
    train(tmp_path / "cut", "steps=1", "replicas=2")
    Trainer.resume(tmp_path / "cut", steps=2).train()
    other = Journal.read(tmp_path / "cut")
    assert [(s.fingerprint, s.rewards) for s in whole.steps] == [(s.fingerprint, s.rewards) for s in other.steps]
    metrics = whole.steps[-1].metrics
    assert 1 <= metrics["turns"] <= 2
    assert metrics["solved"] == metrics["rewards/solved/mean"]
    evaluated = pq.read_table(tmp_path / "one" / "completions" / "evaluation-00002.parquet").to_pylist()
    for row in evaluated:
        transcript = json.loads(row["transcript"])
        assert len(transcript) == 2 * row["turns"]
        assert transcript[-1] == {"role": "assistant", "content": row["completion"]}
    assert {row["turns"] for row in evaluated} <= {1, 2}
    assert 2 in {row["turns"] for row in evaluated}


def train_small(output: Path, *settings: str) -> Journal:
    small = ("population=2", "prompts_per_step=3", "steps=1", "replicas=1", "max_new_tokens=12", "report_to=none")
    Trainer(load(None, [*small, f"output_dir={output}", *settings])).train()
    return Journal.read(output)


def test_the_documented_environment_is_trained_on(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "agents.md").read_text()
    (tmp_path / "guess.py").write_text(text[text.index("# guess.py") :].partition("```")[0])
    journal = train_small(tmp_path / "run", f"task={tmp_path / 'guess.py'}")
    assert 1 <= journal.steps[0].metrics["turns"] <= 3
    (row,) = pq.read_table(tmp_path / "run" / "completions" / "evaluation-00001.parquet").to_pylist()
    roles = [message["role"] for message in json.loads(row["transcript"])]
    assert roles == ["user", "assistant"] * row["turns"]


def test_the_example_of_a_program_is_trained_on(tmp_path: Path) -> None:
    """The embedded model knows these facts, and says more than that."""
    command = f"{sys.executable} -I -S {ROOT / 'examples' / 'agent.py'}"
    data = ("task.name=custom", f"task.data={ROOT / 'examples' / 'facts.jsonl'}", "task.accuracy=right")
    journal = train_small(tmp_path / "run", *data, f"task.program={command}", "task.eval_size=3", "max_new_tokens=40")
    first = journal.evaluations[0].metrics
    assert (first["eval_accuracy"], first["eval_turns"], first["eval_kl"]) == (1.0, 1.0, 0.0)
    (row, *_) = pq.read_table(tmp_path / "run" / "completions" / "evaluation-00000.parquet").to_pylist()
    assert row["reward"] == pytest.approx(1 - len(row["completion"]) / 200)


@pytest.mark.parametrize(("task", "noise"), [("countdown-turns", "iid"), ("countdown", "rank1")])
def test_members_that_are_played_one_by_one_have_the_papers_noise(
    task: str, noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "LEAST_TRIED", 1)  # or the embedded model would be too small for another
    given = [f"task={task}", f"output_dir={tmp_path / 'run'}", "prompts_per_step=3", "replicas=1", "threads=1"]
    Trainer(load(None, given), monitors=[]).close()
    assert Journal.read(tmp_path / "run").header.noise == noise


def test_a_run_whose_rollouts_are_all_late_goes_on(tmp_path: Path) -> None:
    """Nothing was completed that could be compared with the base model."""
    data = ("task.name=custom", f"task.data={ROOT / 'examples' / 'facts.jsonl'}", "task.eval_size=3")
    journal = train_small(tmp_path / "run", *data, "task.program=sleep 60", "rollout_timeout=0.2")
    assert journal.evaluations[0].metrics["eval_rewards/rollout/timeouts"] == 3
    assert "eval_kl" not in journal.evaluations[0].metrics


@pytest.mark.parametrize(
    ("command", "said"),
    [("/no/such x", "there is no such program"), ("", "there is no such program"), ("sh 'x", "No closing quotation")],
)
def test_a_program_that_is_not_there_is_refused_before_anything_is_written(
    command: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("train = [{'prompt': 'a'}]\nevaluation = [{'prompt': 'b'}]\n")
    for task in ("custom", str(tmp_path / "own.py")):
        data = [f"task.data={ROOT / 'examples' / 'facts.jsonl'}"] if task == "custom" else []
        config = load(None, [f"task.name={task}", *data, f"task.program={command}"])
        with pytest.raises(EstuneError, match=f"task.program .*{said}"):
            config.task.build(0)


def test_what_other_processes_cannot_import_is_refused(tmp_path: Path) -> None:
    class Local:
        pass

    task = dataclasses.replace(load(None, SETTINGS).task.build(0), rollout=Rollout("environment", Local))
    with pytest.raises(EstuneError, match=r"rollout .*Local: other processes play it too.*or set replicas=1"):
        Trainer(load(None, [*SETTINGS, "replicas=2", f"output_dir={tmp_path / 'run'}"]), task=task)
    assert not (tmp_path / "run").exists()

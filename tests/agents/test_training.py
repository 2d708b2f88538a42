"""Runs whose rows are played: the same to the bit on any number of replicas, and on from where they were cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from estune.config import load
from estune.journal.journal import Journal
from estune.run.trainer import Trainer

SETTINGS = ("task=countdown-turns", "task.eval_size=16", "population=4", "prompts_per_step=12", "eval_steps=2")
GUESS = """
train = [{"prompt": f"Guess {n}", "number": n} for n in range(8)]
evaluation = [{"prompt": "Guess what", "number": 9}]
accuracy = "long"


class Environment:
    def reset(self, row):
        self.said = [row["prompt"]]
        return row["prompt"]

    def step(self, completion):
        self.said.append(completion)
        if len(self.said) == 3:
            return {"reward": float(len(set("".join(self.said)))), "long": len(completion) > 5}
        return "Again."
"""


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


def test_an_environment_in_a_file_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "guess.py").write_text(GUESS)
    task = f"task={tmp_path / 'guess.py'}"
    Trainer(load(None, [task, "population=2", "prompts_per_step=3", "steps=1", "replicas=1", "max_new_tokens=12",
                        "report_to=none", f"output_dir={tmp_path / 'run'}"])).train()  # fmt: skip
    journal = Journal.read(tmp_path / "run")
    assert journal.steps[0].metrics["turns"] == 2
    assert journal.evaluations[-1].metrics["eval_accuracy"] == 1.0

"""A small run that tests start, in this process or, to be killed, in one of its own: `python -m tests.runs`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.journal.journal import Journal
from estune.journal.records import StepRecord
from estune.run.monitors.base import Summary
from estune.run.trainer import Trainer
from estune.tasks.base import Task

PROMPTS = [f"{a} and {b} make " for a in range(8) for b in range(3)]


def variety(completions: list[str], **_: Any) -> list[float]:
    """Reward for different characters."""
    return [len(set(text)) / 10 for text in completions]


def variety_by_generate(net: Any, tokenizer: Any, prompts: list[str]) -> float:
    """The mean reward of a model's greedy completions of 8 tokens, by transformers alone, prompt by prompt."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = net.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return sum(variety(texts)) / len(texts)


def slow_variety(completions: list[str], **_: Any) -> list[float]:
    """The same, slow enough to be killed at."""
    time.sleep(0.02)
    return variety(completions)


def make_task(*rewards: Any, evaluation: int = 4, **options: Any) -> Task:
    """A task on fixed prompts."""
    functions = list(rewards) or [variety]
    rows = [{"prompt": p} for p in PROMPTS]
    return Task(
        name="variety",
        train=rows[evaluation:],
        evaluation=rows[:evaluation],
        reward_funcs=functions,
        reward_weights=[1.0] * len(functions),
        accuracy=functions[0].__name__,
        **options,
    )


def make_config(output: Path, model: Path, **changes: Any) -> Config:
    """Settings of a run of a second or two."""
    settings = {
        "model": str(model),
        "output_dir": output,
        "steps": 4,
        "population": 4,
        "sigma": 0.02,
        "prompts_per_step": 6,
        "max_new_tokens": 8,
        "eval_steps": 2,
        "report_to": [],
        "replicas": 1,
        "noise": "iid",
    }
    return Config(**{**settings, **changes})


def run(config: Config, *rewards: Any) -> Summary:
    """Train on a task with these rewards."""
    return Trainer(config, task=make_task(*rewards), monitors=[]).train()


def trained(config: Config) -> Path:
    """The directory of a run that has been trained on the usual task."""
    return run(config).run


def train(output: Path, model: Path, **changes: Any) -> list[str]:
    """The fingerprints of a run's steps."""
    Trainer(make_config(output, model, **{"learning_rate": 0.02, **changes}), task=make_task(), monitors=[]).train()
    return [record.fingerprint for record in Journal.read(output).steps]


def cut(run: Path, copy: Path, steps: int) -> None:
    """A copy of a run as it was when it was killed after so many steps."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("final"))
    lines = (copy / "journal.jsonl").read_bytes().splitlines(keepends=True)
    of_steps = [i for i, line in enumerate(lines) if b'"kind":"step"' in line]
    (copy / "journal.jsonl").write_bytes(b"".join(lines[: of_steps[steps - 1] + 1]))


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has written down of its steps and evaluations."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def substance(record: StepRecord) -> Any:
    """What must repeat of a step: all but the times."""
    return record.update, record.rewards, record.prompts, record.fingerprint, record.sigma, record.learning_rate


def assert_same_run(one: Path, other: Path) -> None:
    a, b = Journal.read(one), Journal.read(other)
    assert [substance(r) for r in a.steps] == [substance(r) for r in b.steps]
    assert a.evaluations == b.evaluations
    for name in ("final", "best"):
        assert (one / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()


if __name__ == "__main__":
    output, model, changes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    Trainer(make_config(output, model, **changes), task=make_task(slow_variety)).train()

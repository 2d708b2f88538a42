"""A curriculum in a run: each step's rows come from its stage, and the same ones after a kill or a stop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from estune.config import Config
from estune.journal.journal import Journal
from estune.run.monitors.base import Monitor, Request
from estune.run.trainer import Trainer
from estune.tasks.mix import LABEL
from tests.processes import until
from tests.runs import assert_same_run, make_config

# Full marks from the sixth step on: when a stage ends is then known beforehand.
SOURCE = """
import time

train = [{"prompt": f"NAME {a} and "} for a in range(SIZE)]
evaluation = [{"prompt": f"NAME {a} or "} for a in range(2)]


def ready(completions, trainer_state, **_):
    time.sleep(0.01)
    return [float(trainer_state.global_step >= 6)] * len(completions)


def different(completions, **_):
    return [len(set(text)) / 10 for text in completions]


rewards = [ready, different]
"""
SIZES = {"easy": 9, "hard": 5}
STAGES: list[dict[str, Any]] = [
    {"weights": {"easy": 1}, "until_step": 3},
    {"weights": {"easy": 1, "hard": 1}, "until_accuracy": {"easy": 1.0}},
    {"weights": {"hard": 1}},
]
LABELS = [{"easy"}] * 3 + [{"easy", "hard"}] * 3 + [{"hard"}] * 4
"""Of which tasks the rows of each step may be. Of the stage in the middle they are of both in all, if not in each."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    for name, size in SIZES.items():
        (folder / f"{name}.py").write_text(SOURCE.replace("NAME", name).replace("SIZE", str(size)))
    return {"name": "mix", "tasks": {name: {"name": str(folder / f"{name}.py")} for name in SIZES}}


def settings(output: Path, model: Path, tasks: dict[str, Any], **changes: Any) -> Config:
    task = {**tasks, "stages": STAGES}
    return make_config(
        output, model, **{"steps": 10, "task": task, "prompts_per_step": 4, "max_new_tokens": 6, **changes}
    )


@pytest.fixture(scope="module")
def whole(model: Path, tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Trainer(settings(folder, model, tasks), monitors=[]).train()
    return folder


def rows_of(run: Path) -> list[list[dict[str, Any]]]:
    """The rows that each step used."""
    journal = Journal.read(run)
    train = Config(**journal.settings).task.build(0).train
    return [[train[i] for i in record.prompts] for record in journal.steps]


def prompts(steps: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    return [row["prompt"] for rows in steps for row in rows]


def test_prompts_come_from_the_stage(whole: Path) -> None:
    accuracies = {e.step: e.metrics["eval_accuracy/easy"] for e in Journal.read(whole).evaluations}
    assert accuracies == {0: 0, 2: 0, 4: 0, 6: 1, 8: 1, 10: 1}
    steps = rows_of(whole)
    found = [{row[LABEL] for row in rows} for rows in steps]
    assert all(labels <= expected for labels, expected in zip(found, LABELS, strict=True))
    assert set.union(*found[3:6]) == {"easy", "hard"}
    assert [len(rows) for rows in steps] == [4] * 10
    # Without replacement, and from the start of an epoch where a stage begins.
    assert len(set(prompts(steps[:2]))) == 8
    assert set(prompts(steps[:3])) == {f"easy {a} and " for a in range(9)}
    mixed = [prompt for prompt in prompts(steps[3:6]) if prompt.startswith("easy")]
    assert len(set(mixed)) == len(mixed)
    assert set(prompts(steps[6:8])[:5]) == {f"hard {a} and " for a in range(5)}


def test_a_stage_that_is_never_done_stays(model: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    """Evaluated at the start and the end alone, the run never learns that the second stage is over."""
    Trainer(settings(tmp_path / "run", model, tasks, eval_steps=20), monitors=[]).train()
    found = [{row[LABEL] for row in rows} for rows in rows_of(tmp_path / "run")]
    assert set.union(*found[:3]) == {"easy"}
    assert set.union(*found[3:6]) == set.union(*found[6:]) == {"easy", "hard"}


class Stop(Monitor):
    """Ends the run after a step."""

    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.done = metrics["step"]

    def requests(self) -> set[Request]:
        return {"stop"} if self.done == self.at else set()


@pytest.mark.parametrize("stops", [(2, 3, 5, 6, 9), (1, 4, 7)])
def test_stopped_and_resumed_takes_the_same_rows(
    whole: Path, model: Path, tasks: dict[str, Any], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    first, *later = stops
    summary = Trainer(settings(tmp_path / "run", model, tasks), monitors=[Stop(first)]).train()
    assert (summary.ended, summary.steps) == ("stopped early", first)
    for step in later:
        assert Trainer.resume(tmp_path / "run", monitors=[Stop(step)]).train().steps == step
    assert Trainer.resume(tmp_path / "run", monitors=[]).train().steps == 10
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("steps", [4, 7])
def test_killed_and_resumed_takes_the_same_rows(
    whole: Path, model: Path, tasks: dict[str, Any], tmp_path: Path, steps: int
) -> None:
    run, file = tmp_path / "run", tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings(run, model, tasks).model_dump(mode="json")))
    command = [sys.executable, "-m", "estune.cli", "train", "--config", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        journal = run / "journal.jsonl"

        def far_enough() -> bool:
            assert process.poll() is None, process.communicate()
            return journal.exists() and journal.read_text().count('"kind":"step"') >= steps

        until(far_enough)
        process.kill()
        process.communicate()
    assert steps <= len(Journal.read(run).steps) < 10
    Trainer.resume(run, monitors=[]).train()
    assert_same_run(whole, run)

"""What monitors ask of a run: evaluations, checkpoints and the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.monitors.base import Monitor, Request
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task, substance


class Steering(Monitor):
    """Writes down what it is told, and asks for what it is given by step."""

    def __init__(self, wanted: dict[int, set[Request]]) -> None:
        self.wanted, self.done = wanted, 0
        self.seen: list[str] = []
        self.saved: Callable[[int], None] = lambda step: None

    def on_step_begin(self, step: int) -> None:
        self.seen.append(f"begin {step}")

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.done = metrics["step"]
        self.seen.append(f"end {self.done}")

    def on_evaluate(self, metrics: Any, sample: Any) -> None:
        self.seen.append(f"evaluation {metrics['step']}")

    def on_save(self, step: int) -> None:
        self.saved(step)
        self.seen.append(f"save {step}")

    def requests(self) -> set[Request]:
        return self.wanted.get(self.done, set())


def test_monitors_ask_for_evaluations_checkpoints_and_the_end(model: Path, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"steps": 6, "eval_steps": 0}
    steering, other = Steering({1: {"evaluate"}, 3: {"stop"}}), Steering({1: {"save"}, 2: {"save"}})
    there: list[int] = []
    other.saved = lambda step: there.extend([step] * (run / f"checkpoint-{step}" / "model.safetensors").is_file())
    summary = Trainer(make_config(run, model, **settings), task=make_task(), monitors=[steering, other]).train()
    assert (summary.ended, summary.steps) == ("stopped early", 3)
    assert steering.seen == other.seen == [
        *("evaluation 0", "begin 1", "end 1", "evaluation 1", "save 1"),
        *("begin 2", "end 2", "save 2", "begin 3", "end 3"),
    ]  # fmt: skip
    assert there == [1, 2]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    replay(run, tmp_path / "two", 2)
    saved = (run / "checkpoint-2" / "model.safetensors").read_bytes()
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == saved
    replay(run, tmp_path / "three")
    final = (run / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "three" / "model.safetensors").read_bytes() == final
    assert Trainer.resume(run, task=make_task(), monitors=[]).train().steps == 6
    Trainer(make_config(tmp_path / "whole", model, **settings), task=make_task(), monitors=[]).train()
    whole, cut = Journal.read(tmp_path / "whole"), Journal.read(run)
    assert [substance(record) for record in whole.steps] == [substance(record) for record in cut.steps]
    assert [e.step for e in cut.evaluations] == [0, 1, 6]


def test_checkpoints_on_schedule_are_told_too(model: Path, tmp_path: Path) -> None:
    steering = Steering({2: {"save"}})
    config = make_config(tmp_path / "run", model, steps=3, eval_steps=0, save_steps=2)
    Trainer(config, task=make_task(), monitors=[steering]).train()
    assert [line for line in steering.seen if line.startswith("save")] == ["save 2"]

"""Callbacks of transformers' kind: what they are told and when, and what they may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from estune import ESConfig, ESTrainer
from tests.runs import PROMPTS, variety

ROWS = [{"prompt": prompt} for prompt in PROMPTS]
EVENTS = ("init_end", "train_begin", "step_begin", "step_end", "log", "evaluate", "save", "train_end")


class Recorder:
    """Not a subclass of anything: only the methods count."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.told: dict[str, list[Any]] = {}
        for event in EVENTS:
            setattr(self, f"on_{event}", lambda *given, event=event, **more: self._take(event, *given, **more))

    def _take(self, event: str, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seen.append((event, state.global_step))
        self.told.setdefault(event, []).append(more.get("logs", more.get("metrics")))


def make(output: Path, model: Path, *callbacks: Any, **settings: Any) -> ESTrainer:
    usual = {"steps": 4, "population": 4, "sigma": 0.02, "prompts_per_step": 5, "max_new_tokens": 8, "replicas": 1}
    args = ESConfig(output, **{**usual, "report_to": "none", "eval_steps": 2, "disable_tqdm": True, **settings})
    return ESTrainer(str(model), variety, args, ROWS[4:], ROWS[:4], callbacks=list(callbacks))


def test_events_come_in_transformers_order(model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make(tmp_path / "run", model, recorder, steps=3, save_steps=2)
    assert recorder.seen == [("init_end", 0)]
    trainer.train()
    step = lambda n: [("step_begin", n - 1), ("step_end", n), ("log", n)]  # noqa: E731
    evaluation = lambda n: [("log", n), ("evaluate", n)]  # noqa: E731
    assert recorder.seen[1:] == [
        ("train_begin", 0),
        *evaluation(0),
        *step(1),
        *step(2),
        ("save", 2),
        *evaluation(2),
        *step(3),
        *evaluation(3),
        ("log", 3),
        ("train_end", 3),
    ]
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history] == [0, 1, 2, 2, 3, 3, 3]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert rewards == [logs["reward"] for logs in recorder.told["log"] if "reward" in logs]
    assert len(rewards) == 3
    assert [m["eval_reward"] for m in recorder.told["evaluate"]] == [
        entry["eval_reward"] for entry in history if "eval_reward" in entry
    ]
    assert history[-1].keys() >= {"train_runtime", "train_steps_per_second", "epoch"}
    assert history[-1]["epoch"] == pytest.approx(3 * 5 / 20)


def test_a_callback_stops_evaluates_and_saves(model: Path, tmp_path: Path) -> None:
    class Steer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_evaluate = control.should_save = state.global_step == 1
            control.should_training_stop = state.global_step == 3
            return control

    recorder = Recorder()
    output = make(tmp_path / "run", model, Steer, recorder, steps=9, eval_steps=0).train()
    assert output.global_step == 3
    assert [step for event, step in recorder.seen if event == "evaluate"] == [0, 1]
    assert [step for event, step in recorder.seen if event == "save"] == [1]
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert (tmp_path / "run" / "final").is_dir()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_transformers_own_callbacks_work(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopper = EarlyStoppingCallback(early_stopping_patience=2)
    # A learning rate of zero: no evaluation is ever better than the first.
    trainer = make(
        *(tmp_path / "run", model, stopper, PrinterCallback()),
        **{"steps": 9, "eval_steps": 1, "learning_rate": 0.0, "load_best_model_at_end": True},
    )
    assert trainer.train().global_step == 2
    assert trainer.state.best_global_step == 0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "best")
    printed = capsys.readouterr().out
    assert printed.count("'reward':") == 2
    assert printed.count("'eval_reward':") == 3


def test_logs_are_averages_over_logging_steps(model: Path, tmp_path: Path) -> None:
    every, pairs = Recorder(), Recorder()
    make(tmp_path / "every", model, every).train()
    make(tmp_path / "pairs", model, pairs, logging_steps=2).train()
    one, two = ([logs for logs in recorder.told["log"] if "reward" in logs] for recorder in (every, pairs))
    assert [logs["reward"] for logs in two] == [
        pytest.approx((one[i]["reward"] + one[i + 1]["reward"]) / 2) for i in (0, 2)
    ]
    assert [logs["num_tokens"] for logs in two] == [one[1]["num_tokens"], one[3]["num_tokens"]]


def test_save_total_limit_keeps_the_latest(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "run", model, save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_callbacks_are_added_and_taken_out(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", model, PrinterCallback)
    recorder = Recorder()
    trainer.add_callback(recorder)
    assert trainer.pop_callback(recorder) is recorder
    assert isinstance(trainer.pop_callback(PrinterCallback), PrinterCallback)
    assert trainer.pop_callback(PrinterCallback) is None

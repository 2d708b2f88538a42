"""Runs that are killed, interrupted, or lose a process: nothing is lost, and nobody is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from estune.es.strategy import Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.monitors.base import Monitor
from estune.run.trainer import Trainer
from tests.processes import children, until
from tests.runs import assert_same_run, make_config, make_task, slow_variety


def started(folder: Path, model: Path, changes: dict[str, Any], steps: int) -> subprocess.Popen[str]:
    """The run in a process of its own, with N steps recorded."""
    command = [sys.executable, "-m", "tests.runs", str(folder), str(model), json.dumps(changes)]
    environment = {**os.environ, "COLUMNS": "200"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    journal = folder / "journal.jsonl"

    def far_enough() -> bool:
        assert process.poll() is None, process.communicate()
        return journal.exists() and journal.read_text().count('"kind":"step"') >= steps

    until(far_enough)
    return process


def kill_after(steps: int, folder: Path, model: Path, changes: dict[str, Any], delay: float) -> None:
    """Start the run in a process of its own and kill it, without warning, some time after its Nth step is recorded."""
    process = started(folder, model, changes, steps)
    workers = children(process.pid)
    assert len(workers) == changes.get("replicas", 1) - 1
    time.sleep(delay)
    process.kill()
    process.communicate()
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # no orphans


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "master", "dtype": "bfloat16"},
        {"weights": "copy", "dtype": "bfloat16", "rounding": "stochastic", "replicas": 2, "save_steps": 3},
        {"weights": "inplace", "dtype": "bfloat16", "save_steps": 2, "lr_scheduler_type": "linear"},
    ],
    ids=lambda s: s["weights"],
)
def test_killed_and_resumed_is_undisturbed(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"steps": 12, **settings}
    Trainer(make_config(whole, model, **changes), task=make_task(slow_variety), monitors=[]).train()
    kill_after(4, cut, model, changes, random.Random(str(settings)).uniform(0, 0.1))
    left = len(Journal.read(cut).steps)
    assert 4 <= left < 12
    summary = Trainer.resume(cut, task=make_task(slow_variety), monitors=[]).train()
    assert (summary.steps, summary.ended) == (12, "finished")
    assert_same_run(whole, cut)
    tokens = [[record.metrics["num_tokens"] for record in Journal.read(run).steps] for run in (whole, cut)]
    assert tokens[0] == tokens[1]


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, model, {"steps": 500}, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"go on with: Trainer.resume('{folder}', task=...)" in out
    journal = Journal.read(folder)
    assert 2 <= len(journal.steps) < 500
    replay(folder, tmp_path / "replayed")
    replayed = (tmp_path / "replayed" / "model.safetensors").read_bytes()
    assert (folder / "final" / "model.safetensors").read_bytes() == replayed
    Trainer.resume(folder, steps=len(journal.steps) + 1, task=make_task(slow_variety), monitors=[]).train()


class _Presses(Monitor):
    """Presses Ctrl-C twice as a step begins."""

    def on_step_begin(self, step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once_and_says_how_to_go_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "it's cut"
    Trainer(make_config(whole, model), task=make_task(), monitors=[]).train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(make_config(cut, model), task=make_task(), monitors=[_Presses()]).train()
    first, second = caplog.messages
    assert first.startswith("stopping after this step; press Ctrl-C again to stop at once")
    assert second == f'stopped at once, which lost this step alone; go on with: Trainer.resume("{cut}", task=...)'
    assert len(Journal.read(cut).steps) == 2
    Trainer.resume(cut, task=make_task(), monitors=[]).train()
    assert_same_run(whole, cut)


@pytest.mark.parametrize(("kind", "save_steps"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 2)], ids=["killed", "stopped"])
def test_a_replica_that_is_lost_changes_nothing(
    model: Path, tmp_path: Path, kind: int, save_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a random moment, and at the worst one: in the middle of an update, of whose base it has a share."""
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    changes: dict[str, Any] = {"steps": 4, "replicas": 2, "save_steps": save_steps}
    changes |= {"dtype": "bfloat16", "weights": "copy"}
    Trainer(make_config(whole, model, **changes), task=make_task(slow_variety), monitors=[]).train()

    if kind == signal.SIGSTOP:  # of one that is killed the connection tells, however busy the machine is
        changes["worker_timeout"] = 3
    trainer = Trainer(make_config(hurt, model, **changes), task=make_task(slow_variety), monitors=[])
    pool = trainer.pool
    worker: Any = pool.replicas[1]
    lost: list[int] = []
    evaluate, apply_own = pool.evaluate, pool.own.apply

    def hurt_it() -> None:
        lost.append(worker.process.pid)
        os.kill(lost[-1], kind)

    def meanwhile(*arguments: Any) -> Any:
        if not lost:
            threading.Timer(random.Random(kind).uniform(0, 0.1), hurt_it).start()
        return evaluate(*arguments)

    def in_the_middle(update: Update) -> int:
        if update.step == 2 and len(lost) == 1:
            hurt_it()
        return apply_own(update)

    monkeypatch.setattr(pool, "evaluate", meanwhile)
    monkeypatch.setattr(pool.own, "apply", in_the_middle)
    trainer.train()
    assert len(lost) == 2
    assert_same_run(whole, hurt)
    assert not any(Path(f"/proc/{pid}").exists() for pid in lost)


def test_a_stopped_replica_ends_with_a_parent_that_is_killed(model: Path, tmp_path: Path) -> None:
    process = started(tmp_path / "run", model, {"steps": 500, "replicas": 2}, 1)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.communicate()
    until(lambda: not Path(f"/proc/{worker}").exists())

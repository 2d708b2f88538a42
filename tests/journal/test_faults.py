"""Runs that are killed, interrupted, or lose a process: nothing is lost, and nobody is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.es.strategy import Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.trainer import Trainer
from tests.runs import assert_same_run, make_config, make_task, slow_variety


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended in the meantime
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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

    wait_until(far_enough)
    return process


def kill_after(steps: int, folder: Path, model: Path, changes: dict[str, Any], delay: float) -> None:
    """Start the run in a process of its own and kill it, without warning, some time after its Nth step is recorded."""
    process = started(folder, model, changes, steps)
    workers = children(process.pid)
    assert len(workers) == changes.get("replicas", 1) - 1
    time.sleep(delay)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # no orphans


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "master", "dtype": "bfloat16"},
        {"weights": "copy", "dtype": "bfloat16", "rounding": "stochastic", "replicas": 2, "save_steps": 5},
        {"weights": "inplace", "dtype": "bfloat16", "save_steps": 2, "lr_scheduler_type": "linear"},
    ],
    ids=lambda s: s["weights"],
)
def test_killed_and_resumed_is_undisturbed(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"steps": 24, **settings}
    Trainer(make_config(whole, model, **changes), task=make_task(slow_variety), monitors=[]).train()
    kill_after(7, cut, model, changes, random.Random(str(settings)).uniform(0, 0.1))
    left = len(Journal.read(cut).steps)
    assert 7 <= left < 24
    summary = Trainer.resume(cut, task=make_task(slow_variety), monitors=[]).train()
    assert (summary.steps, summary.ended) == (24, "finished")
    assert_same_run(whole, cut)
    tokens = [[record.metrics["num_tokens"] for record in Journal.read(run).steps] for run in (whole, cut)]
    assert tokens[0] == tokens[1]


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, model, {"steps": 500}, 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"estune train --resume {folder}" in out
    journal = Journal.read(folder)
    assert 2 <= len(journal.steps) < 500
    replay(folder, tmp_path / "replayed")
    replayed = (tmp_path / "replayed" / "model.safetensors").read_bytes()
    assert (folder / "final" / "model.safetensors").read_bytes() == replayed
    Trainer.resume(folder, steps=len(journal.steps) + 1, task=make_task(slow_variety), monitors=[]).train()


def test_a_replica_that_is_killed_stops_the_run_and_loses_nothing(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, model, {"steps": 500, "replicas": 2}, 2)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "a replica's process ended with code -9" in error
    done = len(Journal.read(folder).steps)
    summary = Trainer.resume(folder, steps=done + 1, task=make_task(slow_variety), monitors=[]).train()
    assert summary.steps == done + 1


@pytest.mark.parametrize("save_steps", [0, 2])
def test_a_replica_that_is_killed_in_the_middle_of_an_update_loses_nothing(
    model: Path, tmp_path: Path, save_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is shared: after the kill one half of it has the update, and the other has not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"replicas": 2, "save_steps": save_steps}
    Trainer(make_config(whole, model, **changes), task=make_task(slow_variety), monitors=[]).train()

    others = set(children(os.getpid()))  # of other tests
    trainer = Trainer(make_config(cut, model, **changes), task=make_task(slow_variety), monitors=[])
    pool = trainer.pool
    own = pool.own
    apply_own, apply_all = own.apply, pool.apply
    (worker,) = set(children(os.getpid())) - others

    def stop_worker_first(update: Update) -> str:
        if update.step == 3:
            os.kill(worker, signal.SIGSTOP)
            wait_until(lambda: " T " in Path(f"/proc/{worker}/stat").read_text())
        return apply_all(update)

    def then_kill_it(update: Update) -> int:
        done = apply_own(update)
        if update.step == 3:
            os.kill(worker, signal.SIGKILL)
        return done

    monkeypatch.setattr(pool, "apply", stop_worker_first)
    monkeypatch.setattr(own, "apply", then_kill_it)
    with pytest.raises(EstuneError, match="a replica's process ended with code -9 .*; nothing is lost: resume"):
        trainer.train()
    recorded = [r.fingerprint for r in Journal.read(whole).steps]
    assert own.weights.fingerprint() not in recorded  # neither that of step 3 nor that of step 4
    assert [r.fingerprint for r in Journal.read(cut).steps] == recorded[:3]
    Trainer.resume(cut, task=make_task(slow_variety), monitors=[]).train()
    assert_same_run(whole, cut)

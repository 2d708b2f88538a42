"""Workers that are killed, hang, come late or never: no step is lost, and no process stays behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.pool.ray.handle import RayHandle
from estune.run.trainer import Trainer
from tests.journal.test_faults import started
from tests.processes import children, until
from tests.rays import kill_once, on_call, pid_of, stop, with_workers
from tests.run.test_staleness import assert_rewards_are_those_of_the_bases_named
from tests.runs import assert_same_run, make_task, slow_variety, substance

PHASES = {"open", "generate", "evaluate", "apply", "rebuild", "save"}


def test_killed_in_every_phase(
    cluster: Any, model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = kill_once(monkeypatch, PHASES)
    run = tmp_path / "run"
    trainer = with_workers(run, model, 2)
    evaluate = trainer.pool.evaluate

    def slowly(*arguments: Any) -> Any:  # so that replacements come in time to be killed as well
        trainer.pool.crew.wait(lambda: len(trainer.pool.crew.ready()) == 2 or None)
        return evaluate(*arguments)

    monkeypatch.setattr(trainer.pool, "evaluate", slowly)
    trainer.train()
    assert not left
    assert_same_run(run, undisturbed)


def test_a_worker_that_hangs_is_killed_and_replaced(
    cluster: Any, model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[int] = []

    def hang(handle: RayHandle, kind: str) -> None:
        if kind == "evaluate" and not stopped:
            stopped.append(pid_of(handle))
            stop(stopped[0])

    on_call(monkeypatch, hang)
    run = tmp_path / "run"
    with_workers(run, model, 2, worker_timeout=4).train()
    assert_same_run(run, undisturbed)
    until(lambda: not Path(f"/proc/{stopped[0]}").exists())


def test_a_node_that_comes_late_joins_and_one_that_goes_is_not_missed(
    cluster: Any, model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    trainer = with_workers(run, model, 2, threads=3)  # of five CPUs: room for one
    crew = trainer.pool.crew
    assert [slot.state for slot in crew.slots].count("waiting") == 1
    evaluate, calls = trainer.pool.evaluate, []

    def between(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            calls.append(cluster.add_node(num_cpus=3, object_store_memory=80 << 20))
            crew.wait(lambda: len(crew.ready()) == 2 or None)
        if len(calls) == 6:
            places = [slot.handle.place for slot in crew.slots if slot.handle]
            assert len({place.node for place in places if place}) == 2
            cluster.remove_node(calls[3], allow_graceful=False)
        return evaluate(*arguments)

    trainer.pool.evaluate = between  # type: ignore[method-assign]
    trainer.train()
    assert_same_run(run, undisturbed)


def test_without_any_worker_the_run_stops_and_can_be_resumed(
    cluster: Any, model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estune.pool.crew.MOST_LOSSES", 2)
    run = tmp_path / "run"
    trainer = with_workers(run, model, 1)
    crew = trainer.pool.crew
    killed: list[float] = []

    def kill(handle: RayHandle, kind: str) -> None:
        if len(crew.weights.history) == 3:
            killed.append(time.monotonic())
            os.kill(pid_of(handle), signal.SIGKILL)

    on_call(monkeypatch, kill)
    with pytest.raises(EstuneError, match="3 workers in a row were lost .*killed, out of memory or crashed"):
        trainer.train()
    assert time.monotonic() - killed[0] < 60
    assert len(Journal.read(run).steps) == 3
    monkeypatch.undo()
    Trainer.resume(run, workers=None, task=make_task(slow_variety), monitors=[]).train()
    assert_same_run(run, undisturbed)


def test_no_room_is_said_at_once(cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.pool.crew.PATIENCE", 1.0)
    with pytest.raises(EstuneError, match="room for no worker: each takes 64 CPU of a node, .* of the cluster 5 CPU"):
        with_workers(tmp_path / "run", model, 1, threads=64)


def descendants(parent: int) -> list[int]:
    found = children(parent)
    return [*found, *(pid for child in found for pid in descendants(child))]


@pytest.mark.parametrize("private", [True, False])
def test_a_killed_run_leaves_nobody_behind(
    cluster: Any, model: Path, tmp_path: Path, undisturbed: Path, private: bool
) -> None:
    """On a cluster of its own all processes end; on one that was there before, the run's do."""
    run = tmp_path / "run"
    (raylet,) = (info.process.pid for info in cluster.head_node.all_processes["raylet"])
    address = None if private else cluster.address
    process = started(run, model, {"steps": 200, "replicas": None, "workers": 1, "ray_address": address}, 2)
    if private:
        family = descendants(process.pid)
        assert len(family) > 5
    else:
        family = [pid for pid in children(raylet) if "RayWorker" in name(pid)]
        assert len(family) == 1
    process.kill()
    process.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 60)
    assert ray.nodes()[0]["Alive"]
    done = len(Journal.read(run).steps)
    Trainer.resume(
        run, steps=max(6, done), workers=None, ray_address=None, task=make_task(slow_variety), monitors=[]
    ).train()
    ours, whole = ([substance(record) for record in Journal.read(each).steps] for each in (run, undisturbed))
    assert ours[:6] == whole


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("killed", ["gcs_server", "gcs_server raylet"])
def test_a_cluster_whose_servers_are_killed_is_one_line_and_leaves_nobody(
    model: Path, tmp_path: Path, killed: str
) -> None:
    """A cluster of the run's own: Ray would end the run after a minute, with words of its own, or with none."""
    run = tmp_path / "run"
    process = started(run, model, {"steps": 10_000, "replicas": None, "workers": 1}, 2)
    family = {pid: name(pid) for pid in descendants(process.pid)}
    servers = [pid for pid, text in family.items() if Path(text.split("\0")[0]).name in killed.split()]
    assert len(servers) == len(killed.split())
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    gone = r"raylet\) is gone" if "raylet" in killed else "GCS, .* is gone"
    assert re.search(rf"EstuneError: .*{gone}; no step is lost: resume, with another cluster or none", error), error
    until(lambda: not any(Path(f"/proc/{pid}").exists() and name(pid) == text for pid, text in family.items()), 60)
    assert len(Journal.read(run).steps) >= 2


def test_killed_while_members_are_at_work_ahead(
    cluster: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an evaluation, and of the update that whoever is free first makes for all."""
    left = kill_once(monkeypatch, {"evaluate", "apply"})
    run = tmp_path / "run"
    trainer = with_workers(run, model, 2, steps=6, population=5, max_staleness=1, dtype="float32")
    trainer.pool.wait_for_workers(60)
    trainer.train()
    assert not left
    assert_rewards_are_those_of_the_bases_named(run, model)

"""What a pool makes of its replicas' answers to an update."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Sampling
from estune.config import Config
from estune.engines.progress import together
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.pool.launch import launch_ahead, memory_ahead
from estune.pool.local import LocalPool, open_local_pool
from estune.pool.open import open_pool
from estune.pool.process import WorkerProcess
from estune.pool.replica import Replica
from tests.runs import make_config

UPDATE = Update(0, (Member(3),), (0.25,))


def test_bases_of_their_own_are_compared(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, threads=1)
    replicas = [Replica(config) for _ in range(2)]
    pool = LocalPool(replicas[0], replicas[1:])
    assert pool.apply(UPDATE) == replicas[0].weights.fingerprint() == replicas[1].weights.fingerprint()
    array = next(iter(replicas[1].weights.base.values()))
    array[0] += 1
    with pytest.raises(EstuneError, match="step 1: after the same update replicas' weights differ"):
        pool.apply(UPDATE)
    pool.close()


def test_one_base_is_updated_once(model: Path, tmp_path: Path) -> None:
    config: Config = make_config(tmp_path / "run", model, threads=1)
    alone = Replica(config)
    pool = open_local_pool(config.model_copy(update={"replicas": 2}))
    own = pool.own
    try:
        for step in range(2):
            expected = LocalPool(alone).apply(Update(step, (Member(step), Member(9)), (0.25, -0.5)))
            assert pool.apply(Update(step, (Member(step), Member(9)), (0.25, -0.5))) == expected
            assert own.weights.fingerprint() == expected
        other = pool.replicas[1]
        assert len(other.generate([[7, 8]], Sampling(3))) == 1
        done = other.progress()
        assert (done.read, done.settled) == (2, 3), "what another process does is not seen here"
        assert pool.progress() == together([own.progress(), done])
    finally:
        pool.close()


def test_a_process_that_was_launched_ahead_is_taken_with_its_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config = make_config(tmp_path / "run", model, threads=1, replicas=2, device="cpu")
    launch_ahead(config)
    memory = memory_ahead()
    pool = open_local_pool(config)
    worker: Any = pool.replicas[1]
    taken = worker.process.pid
    alone = Replica(config)
    try:
        assert memory is not None
        assert memory_ahead() is None
        assert worker.inherited == (memory,)
        assert pool.apply(UPDATE) == LocalPool(alone).apply(UPDATE)
        assert worker.process.pid == taken
    finally:
        pool.close()


def test_a_process_ahead_that_nobody_needs_is_ended(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    config = make_config(tmp_path / "run", model, threads=1, device="cpu")
    launch_ahead(config)  # which has one replica
    assert memory_ahead() is None
    launch_ahead(config.model_copy(update={"replicas": None}))
    assert memory_ahead() is not None
    open_pool(config).close()
    assert memory_ahead() is None


@pytest.mark.parametrize("changes", [{"replicas": 1}, {"replicas": 2, "weights": "exact_inplace"}])
def test_a_base_that_nobody_shares_is_plain_memory(
    model: Path, tmp_path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise AssertionError("no shared memory is needed")

    monkeypatch.setattr("estune.pool.local.open_memory", refuse)
    pool = open_local_pool(make_config(tmp_path / "run", model, threads=1).model_copy(update=changes))
    pool.close()


def test_bases_of_their_own_are_made_anew_where_a_process_is(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, threads=1)
    other = WorkerProcess(config)
    threads = ThreadPoolExecutor(2)
    threads.submit(other.open).result()
    pool = LocalPool(Replica(config), [other], threads=threads)
    alone = LocalPool(Replica(config))
    try:
        for step in range(4):
            update = Update(step, (Member(step), Member(9)), (0.25, -0.5))
            if step in {0, 2}:
                assert other.process is not None
                other.process.kill()
            assert pool.apply(update) == alone.apply(update)
            if step == 1:
                pool.save(tmp_path / "checkpoint", "float32")
    finally:
        pool.close()
        alone.close()


def test_processes_that_are_lost_again_and_again_end_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = open_local_pool(make_config(tmp_path / "run", model, threads=1, replicas=2))
    worker: Any = pool.replicas[1]
    apply = worker.apply

    def kill_first(update: Update) -> Any:
        worker.process.kill()
        return apply(update)

    monkeypatch.setattr(worker, "apply", kill_first)
    with pytest.raises(EstuneError, match=r"the replica of process \d+ was lost, the last of 3 .*code -9.*resume"):
        pool.apply(UPDATE)
    pool.close()

"""Engines that start in turn."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from estune.config import Config
from estune.errors import EstuneError
from estune.pool.generator import open_generator
from estune.pool.replica import Replica
from estune.pool.turns import gpus_of, in_turn

HOLDER = """
import sys
from estune.pool.turns import in_turn
with in_turn(sys.argv[1:]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_one_waits_aloud_for_another_process_until_that_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()
    entered = threading.Event()

    def take(record: logging.LogRecord) -> bool:
        told.set()
        return True

    def start() -> None:
        with in_turn(["GPU-b", "GPU-c"], first=0.01):
            entered.set()

    caplog.handler.addFilter(take)
    command = [sys.executable, "-c", HOLDER, "GPU-a", "GPU-b"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with in_turn(["GPU-c"]):
            pass  # the other process does not hold it
        waiting = threading.Thread(target=start)
        waiting.start()
        assert told.wait(60)
        assert not entered.is_set()
        assert "still waiting for another engine to have started on GPU GPU-b" in caplog.text
        holder.kill()
        waiting.join(60)
    assert entered.is_set()


def test_threads_of_one_process_take_turns_too_and_an_error_ends_one() -> None:
    inside: list[int] = []
    most: list[int] = []

    def start(number: int) -> None:
        with in_turn(["GPU-a", "GPU-b"] if number % 2 else ["GPU-b", "GPU-a"]):
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)

    with pytest.raises(ZeroDivisionError), in_turn(["GPU-a"]):
        _ = 1 // 0
    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8


def test_what_one_user_locks_others_can_lock_too(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        with in_turn(["GPU-a"]), in_turn(["GPU-b"]):
            pass
    finally:
        os.umask(mask)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o644, 0o644]


@pytest.mark.parametrize("open_engine", [Replica, open_generator])
def test_vllm_starts_where_its_gpus_are_held(
    open_engine: Callable[[Config], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> None:
        with (tmp_path / "estune-gpu-GPU-a.lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise EstuneError("it has started")

    monkeypatch.setattr("estune.engines.vllm.open.open_vllm", start)
    monkeypatch.setattr("estune.engines.vllm.engine.VllmEngine", start)
    for module in ("replica", "generator"):
        monkeypatch.setattr(f"estune.pool.{module}.gpus_of", lambda config: ["GPU-a"])
    with pytest.raises(EstuneError, match="it has started"):
        open_engine(Config(engine="vllm", device="cpu"))


def test_engines_on_a_cpu_wait_for_nobody() -> None:
    assert gpus_of(Config(device="cpu", engine="vllm", gpus_per_worker=2)) == []

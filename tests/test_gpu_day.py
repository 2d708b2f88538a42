"""The kit for a day with a GPU, on a CPU at toy size."""

from __future__ import annotations

import fcntl
import multiprocessing
from pathlib import Path
from typing import IO

import pytest
from bench.gpu.day import STEPS, Step, run
from bench.processes import Process

from tests.rays import until


@pytest.mark.parametrize("name", ["weights", "training", "transformers"])
def test_a_step_leaves_figures_and_a_log(name: str, tmp_path: Path) -> None:
    found = run(name, STEPS[name], tmp_path, toy=True)
    assert found["outcome"] == "passed", (tmp_path / f"{name}.log").read_text()
    figures = found["figures"]
    assert figures["machine"]["cores"] >= 1
    match name:
        case "weights":
            assert figures["known answers that agree"] == 96
            assert figures["1M"]["elements"] == 867_200
        case "training":
            assert figures["defaults"]["replays on the CPU"]
            assert figures["killed and resumed to the same bits"]
        case "transformers":
            assert figures["1M"]["threads agree"]
            assert figures["1M"]["perturbed after a restore"]
            # What has a bar is written: a toy's size has another name, what stands below it is the same.
            for step in STEPS.values():
                if step.command[0] == "bench.gpu.engine":
                    assert {path.partition("/")[2] for path, _, _ in step.bars} <= set(figures["1M"])


def test_what_fails_is_said_and_what_is_missing_left_out(tmp_path: Path) -> None:
    fails = Step("", ("json.tool", "/nowhere"), ("json.tool", "/nowhere"))
    assert run("fails", fails, tmp_path, toy=False)["outcome"] == "failed: ended with 2, see fails.log"
    lacks = Step("", ("bench.gpu.engine",), (), needs="no_such_package")
    assert run("lacks", lacks, tmp_path, toy=False) == {"outcome": "left out: no_such_package is not installed"}


def test_a_bar_counts_only_where_its_figure_is_there_and_reaches_it(tmp_path: Path) -> None:
    (tmp_path / "written.py").write_text(
        "import sys; open(sys.argv[-1] + '/x.json', 'w').write('{\"7B\": {\"a / b\": 0.5}}')"
    )
    bars = (("7B/a / b", "at least 1", lambda x: x >= 1), ("3B/a / b", "at least 0", lambda x: x >= 0))
    step = Step("", ("written",), (), bars=bars, environment={"PYTHONPATH": str(tmp_path)})
    found = run("bars", step, tmp_path / "results", toy=False)
    assert found["outcome"] == "missed a bar"
    assert found["bars"]["7B/a / b"] == {"bar": "at least 1", "found": 0.5, "reached": False}
    assert found["bars"]["3B/a / b"] == {"bar": "at least 0", "found": None, "reached": False}


def test_nothing_that_a_step_has_started_outlives_it(tmp_path: Path) -> None:
    """It would keep its memory on the GPU. What holds a lock here is started by one that fails at once."""
    (tmp_path / "leaves.py").write_text(
        "import subprocess, sys\n"
        "left = [sys.executable, '-c', 'import fcntl, sys, time; f = open(sys.argv[1], \"w\"); "
        "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(1000)', sys.argv[-1] + '.lock']\n"
        "subprocess.Popen(left, stdout=subprocess.PIPE).stdout.readline()\n"
        "sys.exit(3)\n"
    )
    step = Step("", ("leaves",), (), environment={"PYTHONPATH": str(tmp_path)})
    assert run("leaves", step, tmp_path / "results", toy=False)["outcome"] == "failed: ended with 3, see leaves.log"
    with (tmp_path / "results" / "leaves.lock").open() as file:
        until(lambda: free(file), 20)


def free(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Starts:
    """What a contestant such as vLLM does: it starts a process of `multiprocessing`."""

    def __init__(self) -> None:
        child = multiprocessing.get_context("spawn").Process(target=int)
        child.start()
        child.join()
        self.code = child.exitcode

    def ended(self) -> int | None:
        return self.code


def test_a_contestant_may_start_processes_of_its_own() -> None:
    contestant = Process(Starts)
    assert contestant.call(1, "ended")[0] == 0
    contestant.close()

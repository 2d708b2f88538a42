"""The kit for a day with a GPU, on a CPU at toy size."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from bench.gpu import day
from bench.gpu.day import STEPS, Step, run, run_all
from bench.processes import Process
from rich.console import Console

from tests.processes import alive, until


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


def step_of(folder: Path, name: str, code: str) -> Step:
    """A step that runs this code, with its folder as the last argument."""
    (folder / f"{name}.py").write_text(code)
    return Step("", (name,), (name,), environment={"PYTHONPATH": str(folder)})


def test_what_a_step_has_started_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid)"
    assert run("starts", step_of(tmp_path, "starts", code), tmp_path, toy=False)["outcome"] == "passed"
    child = int((tmp_path / "starts.log").read_text())
    until(lambda: not alive(child), 20)


def test_what_was_found_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    codes = {"done": "", "stopped": stop, "never": ""}
    steps = {name: step_of(tmp_path, name, code) for name, code in codes.items()}
    assert list(run_all(steps, tmp_path, Console(quiet=True), toy=False)) == ["done"]


def test_a_results_folder_with_other_things_keeps_them(tmp_path: Path) -> None:
    kept = tmp_path / "done" / "mine" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("")
    (tmp_path / "done" / "old.json").write_text('{"old": 1}')
    assert run("done", step_of(tmp_path, "does", ""), tmp_path, toy=False)["figures"] == {}
    assert kept.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_said_to_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["day", "--steps", "bits", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        day.main()
    assert "sees no GPU; --toy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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

"""Commands as processes: signals leave nothing running and are one line, and streams may be closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import QUICK
from tests.processes import until
from tests.warm import Closing


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("command", "journal", "code"),
    [
        (["train", "--replicas=2"], "journal.jsonl", -signal.SIGTERM),
        (["sweep", "--replicas=1", "--sweep.seed=0,1"], "seed=0/journal.jsonl", 128 + signal.SIGTERM),
        (["compare", "--methods=es", "--seeds=0"], "es-seed0/run/journal.jsonl", 128 + signal.SIGTERM),
    ],
)
def test_sigterm_leaves_nothing_running(command: list[str], journal: str, code: int, tmp_path: Path) -> None:
    name, *options = command
    steps = [] if name == "compare" else ["--steps=100000"]
    given = [*map(str, QUICK), *steps, *options, f"--output-dir={tmp_path / 'r'}"]
    process = subprocess.Popen([sys.executable, "-m", "estune.cli", name, *given], stdout=subprocess.DEVNULL)
    children: set[int] = set()
    try:
        while not (tmp_path / "r" / journal).is_file():
            assert process.poll() is None
            time.sleep(0.05)
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
        until(lambda: not children & parents().keys(), 20)
    finally:
        for pid in {process.pid, *children} & parents().keys():
            os.kill(pid, signal.SIGKILL)


def parents() -> dict[int, int]:
    """The parent of each process that runs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    """Children of a process, theirs, and so on."""
    children = {child for child, parent in parents().items() if parent == pid}
    return children.union(*map(descendants, children))


@pytest.mark.parametrize(("seconds", "new"), [(0.2, True), (1.5, False)])
def test_ctrl_c_ends_with_one_line_and_130(seconds: float, new: bool, request: pytest.FixtureRequest) -> None:
    """So long after it began to load torch, which takes it longer than half a second, or when that is done."""
    if new:
        request.getfixturevalue("new_interpreters")
    command = [sys.executable, "-m", "estune.cli", "probe", "--members", "64", "--prompts", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, "error: interrupted")


@pytest.mark.parametrize(("seconds", "times"), [(2, 1), (600, 2)])
def test_ctrl_c_is_not_lost_in_an_import_which_a_second_one_ends(tmp_path: Path, seconds: int, times: int) -> None:
    (tmp_path / "slow.py").write_text(
        "import sys, time\nprint('importing', file=sys.stderr, flush=True)\n"
        f"try:\n    time.sleep({seconds})\nexcept KeyboardInterrupt:\n    {'pass' if times == 1 else 'raise'}\n"
        "train = [{'prompt': str(i)} for i in range(64)]\n"
        "def rewards(completions, **_): return [0.0] * len(completions)\n"
    )
    command = [sys.executable, "-m", "estune.cli", "probe", "--task", str(tmp_path / "slow.py"), "--prompts", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (130, "error: interrupted")


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_closed_streams_and_a_narrow_encoding(stream: int, tmp_path: Path) -> None:
    """Two replicas: children inherit streams, and memory that must not have the number of one. All rewards equal."""
    task = tmp_path / "narrow.py"
    task.write_text(
        "def f(completions, **_): return [1.0] * len(completions)\n"
        "train = [{'prompt': f'é中{n}'} for n in range(40)]\nrewards = [f]\n"
    )
    small = "--steps=1 --population=2 --prompts_per_step=2 --max_new_tokens=3 --replicas=2 --task.eval_size=3"
    command = [sys.executable, "-m", "estune.cli", "train", *small.split()]
    command += ["--task", task, "--output-dir", tmp_path / "run"]
    done = subprocess.run(
        command,
        preexec_fn=Closing(stream),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "run" / "final").is_dir()

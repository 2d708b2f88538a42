"""Child processes of a study: what they say of a failure, and that none is left over; folders that one study has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from estune.errors import EstuneError
from estune.study.jobs import Jobs, claimed, complaint
from tests.processes import until

BOX = "╭────╮\n│ 3 │\n╰────╯\n"


def path_with(folder: Path, source: str) -> str:
    """A PYTHONPATH on which the module `child` has this source."""
    (folder / "child.py").write_text(source)
    return os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    )  # an empty one is the present folder


def test_no_file_in_the_working_directory_is_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_interpreters: None
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "json.py").write_text("raise SystemExit('was run')")
    monkeypatch.chdir(work)
    assert Jobs().run("child", log=tmp_path / "log", PYTHONPATH=path_with(tmp_path, "import json; json.dumps")) is None


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (f"{BOX}error: no such model\n{BOX}", "no such model"),
        ("error: of an earlier step\nerror: disk full\nbye\n", "disk full"),
        (f"Traceback (most recent call last):\n  File x\nValueError: odd\n\nmore of it\n{BOX}", "ValueError: odd"),
        (f"Killed by the host\n{BOX}", "Killed by the host"),
        (BOX.replace("3", "─"), None),
        ("out of luck\n+- run -+\n| 3    |\n+------+\n", "out of luck"),
        ("", None),
        (f"error: {'long' * 200}", ("long" * 75)),
    ],
)  # fmt: skip
def test_what_went_wrong_is_found_in_what_was_said(said: str, found: str | None) -> None:
    assert complaint(said) == found


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import sys; print(*sys.argv[1:], sys.stdin.read() == ''); sys.exit(0)", None),
        ("import sys; print('so'); print('error: burnt', file=sys.stderr); print('─'); sys.exit(1)", "burnt"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9 (often a lack of memory)"),
    ],
)  # fmt: skip
def test_a_module_runs_and_says_why_it_failed(tmp_path: Path, source: str, error: str | None) -> None:
    log = tmp_path / "log"
    log.write_text("error: an earlier run's\n")
    assert Jobs().run("child", "a", "b", log=log, PYTHONPATH=path_with(tmp_path, source)) == error
    assert log.read_text().startswith("error: an earlier run's\n" + ("a b True\n" if error is None else ""))


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_study(tmp_path: Path, how: signal.Signals, stopped: bool) -> None:
    """Not even one that no thread of its own could end, as a regular expression holds the interpreter."""
    child = (
        "import os, pathlib, re, sys\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "re.match('(a*)*b', 'a' * 60)\n"
    )
    pid = tmp_path / "pid"
    code = (
        "import sys; from pathlib import Path; from estune.study import jobs as module\n"
        "module.GRACE = 0.5; jobs = module.Jobs()\n"
        "jobs.each(lambda p: jobs.run('child', p, log=Path(p + '.log')), sys.argv[1:], 1)"
    )
    study = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(pid), str(tmp_path / "never")],  # a warm one
        env={**os.environ, "PYTHONPATH": path_with(tmp_path, child)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal is the study's alone
    )
    try:
        until(lambda: pid.is_file() and pid.read_text())
        if stopped:
            os.kill(int(pid.read_text()), signal.SIGSTOP)
        study.send_signal(how)
        study.wait(60)
        until(lambda: not psutil.pid_exists(int(pid.read_text())))
        assert not (tmp_path / "never").exists()  # what had not begun does not begin
    finally:
        study.kill()


def refuse_nothing(_: dict[str, Any]) -> None:
    """Whatever is there may be gone on with."""


def test_a_folder_is_claimed_by_one_process_and_for_one_thing(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with claimed(folder, "what.json", "sweep", {"grid": {"a": 1}}, ["grid"], refuse_nothing):
        second = claimed(folder, "what.json", "sweep", {"grid": {}}, ["grid"], refuse_nothing)
        with pytest.raises(EstuneError, match=r"new is in use by another sweep; wait for it or stop it"), second:
            pass
    seen: list[dict[str, Any]] = []
    with claimed(folder, "what.json", "sweep", {"grid": {"a": 2}}, ["grid"], seen.append):
        assert json.loads((folder / "what.json").read_text()) == {"grid": {"a": 2}}
    assert seen == [{"grid": {"a": 1}}]
    other = claimed(folder, "other.json", "comparison", {}, [], refuse_nothing)
    with pytest.raises(EstuneError, match="not empty and holds no comparison"), other:
        pass

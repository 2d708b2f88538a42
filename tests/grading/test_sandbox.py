"""Programs of models: run without network, files and privileges, and ended whatever they do."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.grading import sandbox
from estune.grading.sandbox import Limits, run_code
from tests.processes import within
from tests.sandboxes import available, folders, helpers

# Of wall time enough for a machine that stands still for a moment; what loops is ended by its processor time.
LIMITS = Limits(wall=4, cpu=1, memory=256 << 20, disk=1 << 20, output=1000)
SEVERAL = replace(LIMITS, processes=6)
pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.skipif(not available(), reason="this system does not allow namespaces"),
]


def run(program: str, **more: Any) -> sandbox.Outcome:
    return run_code(program, **{"limits": LIMITS, **more})


def test_ordinary_programs() -> None:
    assert run("print(input() * 2)", stdin="ab\n").stdout == "abab\n"
    assert run("print(__name__)").stdout == "__main__\n"
    there = (
        [Path(sys.base_prefix).parts[2]] if sys.base_prefix.startswith("/tmp/") else []
    )  # nothing but Python, if it is there
    assert run("import os; print(os.getcwd(), os.listdir())").stdout == f"/tmp {there}\n"
    assert run("open('notes', 'w').write('x'); print(open('notes').read())").stdout == "x\n"
    assert run("print('a'); exit()").stdout == "a\n"
    assert run("import asyncio; print(asyncio.run(asyncio.sleep(0, 'slept')))").stdout == "slept\n"
    shell = "import subprocess; print(subprocess.run(['echo', 'hi'], capture_output=True).stdout)"
    assert run(shell).text.startswith("PermissionError")
    assert run(shell, limits=SEVERAL).stdout == "b'hi\\n'\n"
    failed = run("raise ValueError('no')")
    assert (failed.status, failed.text) == ("failed", "ValueError: no")
    assert run("import sys; sys.exit(3)").status == "failed"
    assert run("input()").text.startswith("EOFError")
    assert run("x = (").text.startswith("SyntaxError")
    assert run("\0").status == "failed"
    refused = run_code("#" * 60_000)
    assert (refused.status, refused.text) == ("refused", "60000 characters, more than 50000")


HOSTILE = {
    "loop": ("while True: pass", "timeout"),
    "sleep": ("import time; time.sleep(60)", "timeout"),
    "regex": ("import re; re.match(r'(a+)+$', 'a' * 64 + 'b')", "timeout"),
    "powers": ("print(44**35**19)", "timeout"),
    "ignored signals": (
        "import signal\nfor s in (1, 2, 15, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "timeout",
    ),
    "memory": ("x = bytearray(1 << 30)", "memory"),
    "brackets": ("exec('(' * 1_000_000)", ("failed", "memory", "crash")),
    "recursion": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        ("failed", "memory", "crash", "timeout"),
    ),
    "segfault": ("import ctypes; ctypes.string_at(0)", "crash"),
    "output": ("while True: print('x' * 10_000)", ("failed", "crash", "timeout")),
    "disk": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 16))", "failed"),
    "many files": ("import os\nfor i in range(64): open(f'{i}', 'wb').write(bytes(1 << 18))", "failed"),
    "open files": ("x = [open('/dev/null') for _ in range(200)]", "failed"),
    "shadow": ("open('/etc/shadow').read()", "failed"),
    "write outside": ("open('/usr/estune', 'w')", "failed"),
    "write to root": ("open('/estune', 'w')", "failed"),
    "write to Python": ("import os; open(os.path.dirname(os.__file__) + '/estune', 'w')", "failed"),
    "other users": ("import os; os.setuid(0)", "failed"),
    "parents": ("import os\nwhile True: os.kill(os.getppid(), 9)", ("timeout", "failed")),
    "first process": ("import os\nfor s in range(1, 32): os.kill(1, s)\nprint('alive')", ("passed", "failed")),
    "more namespaces": (
        "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\n"
        "assert l.unshare(0x10000000) == 0 or l.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
        "failed",
    ),
    "a strange name": (
        r"import ctypes, time; ctypes.CDLL(None).prctl(15, b'\xff\rVmRSS: x', 0, 0, 0); time.sleep(0.1)",
        "passed",
    ),
    "unmount": ("import ctypes; assert ctypes.CDLL(None).umount2(b'/tmp', 2) == 0", "failed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_end_in_time_and_reach_nothing(name: str) -> None:
    program, expected = HOSTILE[name]
    limits = replace(LIMITS, wall=1) if name == "sleep" else LIMITS  # which nothing else ends
    began = time.monotonic()
    outcome = run(program, limits=limits)
    assert time.monotonic() - began < limits.wall + 2
    assert outcome.status in expected if isinstance(expected, tuple) else outcome.status == expected, outcome
    assert len(outcome.stdout) <= LIMITS.output
    if name.startswith("write"):
        assert "Read-only" in outcome.text  # whoever the program runs as
    after = run("print('fine')")
    assert after.stdout == "fine\n", after


def test_there_is_no_network_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert run(program, sandbox="none").status == "passed"
        assert "unreachable" in run(program).text


def test_processes_are_limited_and_die_with_the_program() -> None:
    """Forks that are bounded by themselves: 30 at most, where 6 are allowed."""
    outcome = run(
        "import os, time\nmade = 0\n"
        "for _ in range(30):\n"
        "    try:\n        pid = os.fork()\n"
        "    except OSError:\n        break\n"
        "    if pid == 0:\n        time.sleep(30); os._exit(0)\n"
        "    made += 1\n"
        "print(made)",
        limits=SEVERAL,
    )
    assert outcome.status == "passed"
    assert 1 <= int(outcome.stdout) <= SEVERAL.processes
    daemon = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({sys.executable!r}, ["python", "-c", "import time; time.sleep(60)  # sandbox's sleeper"])
    os._exit(0)
time.sleep(0.2)
"""
    assert run(daemon, limits=SEVERAL).status == "passed"  # and nothing_left_behind


def is_program(pid: str) -> bool:
    """Whether a sandbox's process has become the program."""
    try:
        return b"-X\0utf8" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def killed_while_waiting(**more: Any) -> set[Path]:
    """Folders that are left where whoever waits for a program is killed once that has begun. All processes must end."""
    before = folders()
    pid = os.fork()
    if pid == 0:
        try:
            run_code("import time; time.sleep(20)  # sandbox's sleeper", limits=Limits(wall=30), **more)
        finally:
            os._exit(0)
    within(5, lambda: any(map(is_program, helpers())))
    assert len(helpers()) == 2
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    within(2, lambda: not helpers())
    assert not helpers()
    return folders() - before


def test_a_sandbox_ends_with_the_process_that_wants_its_outcome_and_leaves_nothing() -> None:
    assert not killed_while_waiting()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the deadline ends it")
def test_without_namespaces_too_and_the_folder_is_swept_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = killed_while_waiting(sandbox="none")
    monkeypatch.setattr(sandbox, "SETTLED_SECONDS", 0)
    sandbox.clear_leftovers.cache_clear()
    run("pass")
    assert not folder.exists()


def test_only_what_is_ours_and_dead_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("estune-sandbox-dead", "estune-sandbox-used", "estune-sandbox-new", "estune-sandboxed", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "estune-sandbox-link").symlink_to(tmp_path / "other")
    left = {path.name for path in tmp_path.iterdir()} - {"estune-sandbox-dead"}
    used = os.open(tmp_path / "estune-sandbox-used", os.O_RDONLY)
    fcntl.flock(used, fcntl.LOCK_EX)
    sandbox.clear_leftovers.__wrapped__()
    os.close(used)
    assert {path.name for path in tmp_path.iterdir()} == left
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_packages_are_seen_only_if_they_are_asked_for() -> None:
    look = """
import glob, sys
print(sys.path == [path for path in sys.path if "packages" not in path])
prefixes = {sys.prefix, "/usr", "/usr/local"}
print([path for prefix in prefixes for path in glob.glob(f"{prefix}/lib*/python3*/*-packages/*")])
print(glob.glob("/packages/*"))
import pytest
"""
    hidden = run(look)
    assert hidden.stdout == "True\n[]\n[]\n"
    assert hidden.text == "ModuleNotFoundError: No module named 'pytest'"
    assert run("import pytest", sandbox="none").text == hidden.text
    for isolation in ("namespaces", "none"):
        shown = run("import os, iniconfig; print(iniconfig.__name__)", packages=["iniconfig"], sandbox=isolation)
        assert shown.stdout == "iniconfig\n"
    shown = run("import os; print(sorted(os.listdir('/packages')))", packages=["iniconfig"])
    assert [name for name in eval(shown.stdout) if "dist-info" not in name] == ["iniconfig"]
    with pytest.raises(EstuneError, match="package 'no-such' is not installed here"):
        run("pass", packages=["no-such"])


def test_tests_are_counted_and_cannot_be_skipped() -> None:
    tests = ["assert double(1) == 2", "assert double(2) == 5", "assert double('a') == 'aa'"]
    outcome = run("def double(x): return 2 * x", tests=tests)
    assert (outcome.status, outcome.passed, outcome.tests) == ("failed", 2, 3)
    assert run("def double(x): return 2 * x", tests=tests[::2]).status == "passed"
    for cheat in (
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def double(x): raise SystemExit(0)",
        "import atexit, os; atexit.register(os._exit, 0)\nraise KeyboardInterrupt",
        "print('0 0'); print('passed'); double = None",
        "import __main__, os\nnames = vars(__main__)\n"
        "for n in (0, 1, 'end'): os.write(names['report'], f\"{names['job']['secret']} {n}\\n\".encode())\nos._exit(0)",
        "import os\nfor fd in range(1, 20):\n    try: os.write(fd, b'secret 0\\nsecret 1\\nsecret end\\n')\n"
        "    except OSError: pass\ndouble = None",
    ):
        outcome = run(cheat, tests=tests[::2])
        assert outcome.status != "passed", cheat
        assert outcome.passed == 0, cheat
    slow = run("import time\ndef double(x): return 2 * x if x == 1 else time.sleep(60)", tests=tests)
    assert (slow.status, slow.passed) == ("timeout", 1)


def test_without_isolation_there_is_a_refusal_unless_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        EstuneError, match=r'programs cannot be isolated here \(darwin has no namespaces\).*sandbox="none"'
    ):
        run_code("print(1)")
    monkeypatch.undo()
    began = time.monotonic()
    assert run("print(2)", sandbox="none").stdout == "2\n"
    assert run("while True: pass", sandbox="none").status == "timeout"
    assert run("x = bytearray(1 << 30)", sandbox="none").status == "memory"
    assert run("def f(): return 1", tests=["assert f() == 1"], sandbox="none").status == "passed"
    assert time.monotonic() - began < 10

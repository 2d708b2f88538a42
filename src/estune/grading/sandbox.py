"""Programs that a model wrote, run where they can do no harm.

What holds them is described in `jail.py`. It is a fence against what a model writes by accident or because it pays, and
no protection against an attack on the kernel. A program can also see through the tests: it runs in one process with
them, so an object that equals everything passes, and one that searches the frames of its own process finds how passed
tests are reported. What does not pass is to end early, to print something, or to look into `__main__`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from estune.errors import EstuneError

Isolation = Literal["namespaces", "none"]
Status = Literal["passed", "failed", "timeout", "memory", "crash", "refused"]

_JAIL = Path(__file__).with_name("jail.py")
_GRACE_SECONDS = 10  # for the helper to start and to tell the outcome


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        wall: seconds until everything is killed.
        cpu: seconds of processor time of one process, whole.
        memory: bytes of address space of one process.
        disk: bytes of a file, and of all files together.
        processes: processes and threads at a time; only in namespaces.
        output: bytes kept of what it prints to each of standard output and standard error.
        length: characters of the longest program.
    """

    wall: float = 5.0
    cpu: int = 5
    memory: int = 512 << 20
    disk: int = 16 << 20
    processes: int = 8
    output: int = 65_536
    length: int = 50_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program.

    Attributes:
        status: `passed`: it ended with code 0, and all tests passed. `failed`: it raised, ended with another code, or a
            test failed. `timeout`: it used its time up. `memory`: it asked for more than it may have. `crash`: a signal
            ended it. `refused`: it was not run, being too long.
        text: the last line of standard error, or why it was refused.
        stdout: what it printed; nothing where there are tests.
        passed: tests that passed, of `tests`.
        tests: number of tests.
        seconds: how long it took.
    """

    status: Status
    text: str = ""
    stdout: str = ""
    passed: int = 0
    tests: int = 0
    seconds: float = 0.0


def run_code(
    program: str,
    *,
    stdin: str = "",
    tests: Sequence[str] = (),
    limits: Limits | None = None,
    sandbox: Isolation = "namespaces",
) -> Outcome:
    """Run a Python program in a process without network, in an empty folder, with this interpreter and its packages.

    Args:
        program: its text. It is `__main__`, unless there are tests.
        stdin: its standard input.
        tests: statements to execute one after the other in the program's names once it has run, such as `assert`s.
        limits: what it may use.
        sandbox: `none` gives up the namespaces, and with them everything but limits on one process: for systems that
            have none, and programs that are trusted. They can then reach the network and the user's files.

    Returns:
        The outcome, whatever the program does.

    Raises:
        EstuneError: this system does not allow the isolation.
    """
    limits = limits or Limits()
    if len(program) > limits.length:
        return Outcome("refused", f"{len(program)} characters, more than {limits.length}", tests=len(tests))
    if sandbox == "namespaces" and sys.platform != "linux":
        raise _unavailable(f"{sys.platform} has no namespaces")
    secret = secrets.token_hex(8)
    job = {
        "program": program,
        "stdin": stdin,
        "tests": list(tests),
        "secret": secret,
        "namespaces": sandbox == "namespaces",
        "visible": [str(Path(sys.executable).parent), *_package_folders()],
        **{name: getattr(limits, name) for name in ("wall", "cpu", "memory", "disk", "processes", "output")},
    }
    job["folder"] = tempfile.mkdtemp(prefix="estune-sandbox-")
    try:
        found = _helper(json.dumps(job), limits.wall)
    finally:
        if sandbox == "namespaces":
            os.rmdir(job["folder"])  # nothing more: what is mounted over it elsewhere must never be walked into
        else:
            shutil.rmtree(job["folder"], ignore_errors=True)
    if found["status"] == "unavailable":
        raise _unavailable(found["stderr"])
    reports = [line.split() for line in found.get("stdout", "").splitlines()] if tests else []
    marks = {line[1] for line in reports if len(line) == 2 and line[0] == secret}
    text = (found.get("stderr", "").strip().splitlines() or [""])[-1][:300]
    return Outcome(
        _status(found, text, bool(tests) and "end" not in marks),
        text,
        "" if tests else found.get("stdout", ""),
        len(marks - {"end"}),
        len(tests),
        float(found.get("seconds", limits.wall)),
    )


def _helper(job: str, wall: float) -> dict[str, str]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        out, err = process.communicate(job, timeout=wall + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": "timeout"}
    finally:
        process.kill()  # the namespace dies with it
        process.wait()
    found: dict[str, str] = json.loads(out) if out else {"status": "unavailable", "stderr": err.strip()[-300:]}
    return found


def _status(found: dict[str, str], text: str, short: bool) -> Status:
    code: object = found.get("code")
    if found["status"] == "timeout" or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    if text.startswith("MemoryError"):
        return "memory"
    if isinstance(code, int) and code < 0:
        return "crash"
    return "failed" if code != 0 or short else "passed"


def _package_folders() -> list[str]:
    """Where this interpreter has its packages, if that is outside of its own folders."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir()]


def _unavailable(why: str) -> EstuneError:
    return EstuneError(
        f"programs cannot be isolated here ({why}); run where user namespaces are allowed, or as root, or give "
        'sandbox="none" if you trust what the model writes'
    )

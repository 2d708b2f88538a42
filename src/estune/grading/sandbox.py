"""Programs that a model wrote, run where they can do no harm.

What confines them is described in `jail.py`. It is a fence against what a model writes by accident or because it pays,
and no protection against an attack on the kernel. If a test has a shape that `sealed.py` knows, the value that it
expects never comes near the program. Any other test runs in one process with the program, which can cheat: an object
that equals everything passes, and so does a program that searches its process for how passed tests are reported.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from estune.errors import EstuneError
from estune.grading.sealed import Sealed, seal, values_of
from estune.grading.seccomp import program_filter

Isolation = Literal["namespaces", "none"]
Status = Literal["passed", "failed", "timeout", "memory", "crash", "refused"]

_JAIL = Path(__file__).with_name("jail.py")
_GRACE_SECONDS = 10  # for the keeper to start and to tell the outcome
_FOLDER = "estune-sandbox-"
SETTLED_SECONDS = 60  # a folder that is younger may not be locked yet


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        wall: seconds until everything is killed.
        cpu: seconds of processor time of one process, whole.
        memory: bytes that all processes may hold together; each has an equal part of them as its address space.
        disk: bytes of a file, and of all files together.
        processes: processes at a time. A single one has up to 8 threads; with several, each thread counts as one. This
            holds in namespaces, and for one process also without them on Linux.
        output: bytes that are kept of each of standard output and standard error.
        length: characters of the longest program.
    """

    wall: float = 5.0
    cpu: int = 5
    memory: int = 512 << 20
    disk: int = 16 << 20
    processes: int = 1
    output: int = 65_536
    length: int = 50_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program.

    Attributes:
        status: `passed`: it ended with code 0, and all tests passed. `failed`: it raised, ended with another code, or a
            test failed. `timeout`: it used its time up. `memory`: it asked for more than it may have. `crash`: a signal
            ended it, or its keeper. `refused`: it was not run, being too long.
        text: the last line of standard error, or why it was refused.
        stdout: what it printed; nothing where there are tests.
        passed: tests that passed, of `tests`.
        tests: number of tests.
        unsealed: how many of them are of a shape that cannot be kept from the program.
        seconds: how long it took.
    """

    status: Status
    text: str = ""
    stdout: str = ""
    passed: int = 0
    tests: int = 0
    unsealed: int = 0
    seconds: float = 0.0


def run_code(
    program: str,
    *,
    stdin: str = "",
    setup: str = "",
    tests: Sequence[str] = (),
    packages: Sequence[str] = (),
    limits: Limits | None = None,
    sandbox: Isolation = "namespaces",
) -> Outcome:
    """Run a Python program in a process without network, in an empty folder, with this Python's standard library.

    Args:
        program: its text. It is `__main__`, unless there are tests.
        stdin: its standard input.
        setup: what runs before the program, and does not count as its doing.
        tests: statements to execute one after the other in the program's names once it has run, such as `assert`s.
        packages: installed packages that it may import, by the names they are installed by; none of what they need
            comes along.
        limits: what it may use.
        sandbox: `none` gives up the namespaces, and with them everything but limits on one process: for systems that
            have none, and programs that are trusted. They can then reach the network and the user's files.

    Returns:
        The outcome, whatever the program does.

    Raises:
        EstuneError: this system does not allow the isolation, or a package is not installed.
    """
    limits = limits or Limits()
    sealed = [seal(test, setup) for test in tests]
    unsealed = sum(test is None for test in sealed)
    if len(program) > limits.length:
        why = f"{len(program)} characters, more than {limits.length}"
        return Outcome("refused", why, tests=len(tests), unsealed=unsealed)
    if sandbox == "namespaces" and sys.platform != "linux":
        raise _unavailable(f"{sys.platform} has no namespaces")
    code = program_filter(limits.processes)
    if sandbox == "namespaces" and code is None:
        raise _unavailable(f"there is no filter of system calls for {platform.machine()}")
    secret = secrets.token_hex(8)
    found_packages = [path for name in packages for path in _paths_of(name)]
    job: dict[str, Any] = {
        "program": f"{setup}\n{program}" if setup else program,
        "stdin": stdin,
        "tests": [
            test if parts is None else {"steps": parts.steps, "apart": parts.apart}
            for test, parts in zip(tests, sealed, strict=True)
        ],
        "secret": secret if unsealed else None,
        "filter": code.hex() if code else "",
        "namespaces": sandbox == "namespaces",
        "python": _python(),
        "hidden": _other_packages(),
        "packages": found_packages,
        "path": _import_from(found_packages, sandbox),
        **{name: getattr(limits, name) for name in ("wall", "cpu", "memory", "disk", "processes", "output")},
    }
    clear_leftovers()
    if sandbox == "namespaces":
        found = _keeper(json.dumps(job), limits.wall)
    else:
        with _folder() as job["folder"]:
            found = _keeper(json.dumps(job), limits.wall)
    if found["status"] == "unavailable":
        raise _unavailable(found["stderr"])
    return _outcome(found, sealed, secret, limits)


def _outcome(found: dict[str, Any], tests: Sequence[Sealed | None], secret: str, limits: Limits) -> Outcome:
    """The outcome of a program, from what its keeper found."""
    stdout = found.get("stdout", "")
    passed = _passed(stdout.split("\n") if tests else [], tests, secret)
    text = (found.get("stderr", "").strip().splitlines() or [""])[-1][:300]
    status = _status(found, text, len(passed) < len(tests))
    if status == "failed" and not text:
        text = next((f"test {n} does not hold" for n in range(len(tests)) if n not in passed), "")
    return Outcome(
        status,
        text,
        "" if tests else stdout,
        len(passed),
        len(tests),
        sum(test is None for test in tests),
        float(found.get("seconds", limits.wall)),
    )


def _passed(lines: list[str], tests: Sequence[Sealed | None], secret: str) -> set[int]:
    """Numbers of the tests that passed: sealed tests by the values that came back, others by the secret."""
    values = values_of(lines)
    told = set(lines)
    return {
        number
        for number, test in enumerate(tests)
        if (f"{secret} {number}" in told if test is None else test.holds(values.get(number, {})))
    }


def _keeper(job: str, wall: float) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        out, err = process.communicate(job, timeout=wall + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"status": "timeout"}
    finally:
        process.kill()  # the program dies with it
        process.wait()
    if process.returncode < 0:
        return {"status": "died", "stderr": "the keeper died"}
    found: dict[str, Any] = json.loads(out) if out else {"status": "unavailable", "stderr": err.strip()[-300:]}
    return found


def _status(found: dict[str, Any], text: str, short: bool) -> Status:
    code: object = found.get("code")
    if found["status"] == "died":
        return "crash"
    if found["status"] == "timeout" or code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    if found["status"] == "memory" or text.startswith("MemoryError"):
        return "memory"
    if isinstance(code, int) and code < 0:
        return "crash"
    return "failed" if code != 0 or short else "passed"


@cache
def _python() -> str:
    """The interpreter itself, outside of any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _other_packages() -> list[str]:
    """Folders of packages that lie within what a program is shown."""
    prefixes = {sys.base_prefix, os.path.realpath(sys.base_prefix), "/usr", "/usr/local"}
    found = {
        os.path.realpath(path)
        for prefix in prefixes
        for name in ("site-packages", "dist-packages")
        for path in Path(prefix).glob(f"lib*/python3*/{name}")
    }
    return sorted(found)


@cache
def _paths_of(package: str) -> list[str]:
    """The files and folders that an installed package has put beside the others."""
    from importlib import metadata  # which every grader, as it imports this module, does without

    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise EstuneError(f"package {package!r} is not installed here; install it, or do without it") from None
    names = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
    if all(name.endswith((".dist-info", ".pth")) for name in names):
        raise EstuneError(f"package {package!r} has no files of its own here; install it as a wheel")
    return sorted(os.path.realpath(str(found.locate_file(name))) for name in names if not name.endswith(".pth"))


def _import_from(packages: Sequence[str], sandbox: Isolation) -> list[str]:
    if sandbox == "namespaces":
        return ["/packages"] if packages else []
    return sorted({os.path.dirname(path) for path in packages})


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder, locked so that it can be told from what a kill has left."""
    folder = tempfile.mkdtemp(prefix=_FOLDER)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@cache
def clear_leftovers() -> None:
    """Remove what killed processes of this user have left, once in this process."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < SETTLED_SECONDS:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _unavailable(why: str) -> EstuneError:
    return EstuneError(
        f"programs cannot be isolated here ({why}); run where user namespaces are allowed, or as root, or give "
        'sandbox="none" if you trust what the model writes'
    )

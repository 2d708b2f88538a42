"""Programs that attack: as root and as a user without rights, none gets more than it may, and none forges a pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from estune.grading.sandbox import Limits, run_code
from tests.hostile_programs import DOUBLES, FORGERIES, KEEPER, MEMORY
from tests.sandboxes import available

pytestmark = [
    pytest.mark.usefixtures("sandboxes_alone"),
    pytest.mark.skipif(not available(), reason="this system does not allow namespaces"),
]

MEBIBYTE = 1 << 20
LIMITS = {"wall": 6, "cpu": 4, "memory": 64 * MEBIBYTE, "disk": MEBIBYTE}
RUNNER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from estune.grading.sandbox import Limits, run_code

def run(job):
    name, program, tests, limits = job
    return name, asdict(run_code(program, tests=tests, limits=Limits(**limits)))

with ThreadPoolExecutor(2) as threads:
    json.dump(list(threads.map(run, json.load(sys.stdin))), sys.stdout)
"""
NOBODY = 65534


def python_for(user: int | None) -> str | None:
    """An interpreter that this user (None: whoever runs this) can start, if there is one and there are namespaces."""
    apart = ["unshare", "--user", "-mnpiu", "--fork", "true"]
    if user is not None and subprocess.run(apart, check=False, **how(user)).returncode != 0:
        return None
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    for path in (sys.executable, base, "/usr/local/bin/python3", "/usr/bin/python3"):
        try:
            subprocess.run([path, "-c", RUNNER], input="[]", text=True, check=True, **how(user))
        except (OSError, subprocess.CalledProcessError):
            continue
        return path
    return None


def how(user: int | None) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    rights = {} if user is None else {"user": user, "group": user, "extra_groups": [], "cwd": "/"}
    return {"env": environment, "capture_output": True, **rights}


@pytest.mark.parametrize("user", [None, NOBODY], ids=["whoever runs this", "nobody"])
def test_no_attack_succeeds(user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only root can become another; the attacks are made as this user")
    python = python_for(user)
    if python is None:
        pytest.skip("a user without rights has no namespaces here, or no Python that it can start")
    jobs: list[tuple[str, str, list[str], Any]] = [
        (name, program, [], LIMITS) for name, program in {**MEMORY, **KEEPER}.items()
    ]
    for name, program in FORGERIES.items():
        variants = DOUBLES if name in ("equal to everything", "a number that lies", "an edited job") else DOUBLES[:1]
        jobs += [(f"{name}: {i}", program, tests, LIMITS) for i, tests in enumerate(variants)]
    done = subprocess.run([python, "-c", RUNNER], input=json.dumps(jobs), text=True, check=False, **how(user))
    assert done.returncode == 0, done.stderr
    outcomes = dict(json.loads(done.stdout))
    assert outcomes.keys() == {job[0] for job in jobs}
    held = {
        name: outcomes[name]
        for name in MEMORY
        if outcomes[name]["status"] != "memory" and not float(outcomes[name]["stdout"] or "inf") <= 16
    }
    assert not held
    assert {name for name in MEMORY if outcomes[name]["status"] == "memory"} == {"page tables", "page tables of zeros"}
    assert not {name: outcomes[name] for name in KEEPER if outcomes[name]["stdout"] != "done\n"}
    forged = {
        name: outcome
        for name, outcome in outcomes.items()
        if outcome["passed"] or (outcome["tests"] and outcome["unsealed"])
    }
    assert not forged
    assert not {name for name, outcome in outcomes.items() if outcome["tests"] and outcome["status"] == "passed"}


def test_forgeries_are_of_something_that_can_pass() -> None:
    right = "def double(x): return 2000002 * x"
    for tests in DOUBLES[:2]:
        assert run_code(right, tests=tests).passed == len(tests)


def test_several_processes_share_the_memory() -> None:
    limits = Limits(wall=5, memory=128 * MEBIBYTE, processes=4)
    program = """
import os
def child(size):
    pid = os.fork()
    if pid == 0:
        try: x = bytearray(size)
        except MemoryError: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(child(8 << 20), child(40 << 20))
"""
    assert run_code(program, limits=limits).stdout == "0 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no filter elsewhere")
def test_a_dead_keeper_is_a_crash_of_the_program() -> None:
    outcome = run_code("import os; os.kill(os.getppid(), 9)", sandbox="none")
    assert (outcome.status, outcome.text) == ("crash", "the keeper died")


def test_a_keeper_that_fails_once_the_program_runs_is_a_crash_of_the_program() -> None:
    outcome = run_code("", limits=Limits(output=None))  # type: ignore[arg-type]
    assert outcome.status == "crash"
    assert outcome.text.startswith("the keeper died: TypeError")

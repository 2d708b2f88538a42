"""What the sandbox holds: memory at its peak under attack, forged passes, and whether right programs still pass.

    python -m bench.speed.sandbox [--python /usr/bin/python3] [--data mbpp.jsonl HumanEval.jsonl]

- Memory: each attack of `tests/hostile_programs.py` with the usual limits (512 MiB), as root and as nobody. The
  peak is that of a memory control group around everything, which limits nothing: it counts the kernel's memory too, and
  the 20 MiB of the process that waits. As root only, where such groups can be made.
- Passes: how many of the forgeries there passed a test.
- Data, if there are any: how many of their tests are sealed, and how many of their own solutions pass.

`--python` is an interpreter that nobody can start (at least 3.11; it needs no packages).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import options, settings, write_result
from tests.hostile_programs import DOUBLES, FORGERIES, MEMORY

from estune.grading.sandbox import Limits
from estune.rewards.code import unit_tests, unsealed_tests
from estune.tasks.code import CodeConfig, block

NOBODY = 65534
GROUPS = (  # where a group is made, and the file that tells its peak
    (Path("/sys/fs/cgroup/memory/estune-bench"), "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup/estune-bench"), "memory.peak"),
)
RUNNER = """
import json, sys
from dataclasses import asdict
from estune.grading.sandbox import run_code
program, tests = json.load(sys.stdin)
json.dump(asdict(run_code(program, tests=tests)), sys.stdout)
"""
# Everything at once: what is allowed beside the address space, and then that.
ALL = (
    MEMORY["sockets"]
    + """
keep[0].close()
try:
    with open("big", "wb") as file:
        while True: file.write(bytes(M))
except OSError: pass
for size in (M, 4096):
    try:
        while True: keep.append(b"x" * size)
    except MemoryError: pass
"""
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", default="/usr/bin/python3", metavar="PATH", help="one that nobody can start")
    parser.add_argument("--data", nargs="*", default=[], metavar="FILE", help="rows as the code task takes them")
    arguments = parser.parse_args()
    attacks = {
        "nothing": "pass",
        **MEMORY,
        "all at once": ALL,
        "plainly": "x = [b'x' * (1 << 20) for _ in range(4096)]",
    }
    peaks: dict[str, Any] = {}
    forged = {}
    for name, user in {"root": 0, "nobody": NOBODY}.items():
        if os.getuid() == 0:
            peaks[name] = {attack: peak(arguments.python, user, program) for attack, program in attacks.items()}
            outcomes = [attacked(arguments.python, user, program, DOUBLES[0]) for program in FORGERIES.values()]
            forged[name] = {"forgeries": len(outcomes), "passed": sum(outcome["passed"] for outcome in outcomes)}
    result = {
        "settings": settings(arguments),
        "limit_mib": Limits().memory >> 20,
        "peak_mib": peaks,
        "highest": {name: max(found.values()) for name, found in peaks.items()},
        "forged": forged,
        "data": {Path(file).name: own_solutions(file) for file in arguments.data},
    }
    write_result("sandbox", result, arguments.results)


def attacked(python: str, user: int, program: str, tests: Sequence[str] = (), group: Path | None = None) -> Any:
    """The outcome of a program, run by another process as a user, in a control group."""
    enter = f"echo $$ > {group}/cgroup.procs; " if group else ""
    become = f'exec setpriv --reuid {user} --regid {user} --clear-groups {python} -c "$0"'
    done = subprocess.run(
        ["sh", "-c", enter + become, RUNNER],
        input=json.dumps([program, tests]),
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": os.environ["PATH"]},
    )
    return json.loads(done.stdout)


def peak(python: str, user: int, program: str) -> float:
    """MiB at the peak."""
    for group, file in GROUPS:
        if group.parent.is_dir() and (group.parent / "cgroup.procs").exists():
            group.mkdir(exist_ok=True)
            try:
                if (group / file).exists():
                    attacked(python, user, program, group=group)
                    return round(int((group / file).read_text()) / 2**20, 1)
            finally:
                group.rmdir()
    sys.exit("no control group with the memory's controller can be made here")


def own_solutions(file: str) -> dict[str, int]:
    task = CodeConfig(data=file, eval_data=None).build(0)
    rows = [*task.train, *task.evaluation]
    unsealed, tests = unsealed_tests(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores = unit_tests(
        prompts=[row["prompt"] for row in rows], completions=[block(row["solution"]) for row in rows], **columns
    )
    return {"tests": tests, "sealed": tests - unsealed, "solutions": len(rows), "passed": scores.count(1.0)}


if __name__ == "__main__":
    main()

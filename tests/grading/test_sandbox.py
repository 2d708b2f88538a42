"""Programs of models: run without network, files and privileges, and ended whatever they do."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading import sandbox
from estune.grading.grading import Grading
from estune.grading.sandbox import Limits, run_code
from estune.rewards.code import unit_test_fraction, unit_tests, worthless
from estune.rewards.programs import extract_code, same_output
from estune.tasks.base import Task
from estune.tasks.preflight import preflight

# Of wall time enough for a machine that stands still for a moment; what loops is ended by its processor time.
LIMITS = Limits(wall=4, cpu=1, memory=256 << 20, disk=1 << 20, output=1000)
SEVERAL = replace(LIMITS, processes=6)


def available() -> bool:
    """Whether the system allows namespaces, by another's word than that of what is tested."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", *(["--user"] if os.getuid() else []), "-mnpiu", "--fork", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not available(), reason="this system does not allow namespaces")


@pytest.fixture(autouse=True)
def nothing_left_behind(sandboxes_alone: None) -> Iterator[None]:
    before = helpers(), folders()
    yield
    wait(lambda: (helpers(), folders()) == before, seconds=2)
    assert (helpers(), folders()) == before


def wait(condition: Callable[[], bool], seconds: float) -> None:
    """Until it holds, or so long."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def helpers() -> set[str]:
    """Processes of sandboxes: keepers, programs and what those started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"jail.py" in words or b"-X\0utf8" in words or b"sandbox's sleeper" in words:
            found.add(path.parent.name)
    return found


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("estune-sandbox-*"))


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
    began = time.monotonic()
    outcome = run(program)
    assert time.monotonic() - began < LIMITS.wall + 2
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
    wait(lambda: any(map(is_program, helpers())), seconds=5)
    assert len(helpers()) == 2
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    wait(lambda: not helpers(), seconds=2)
    assert not helpers()
    return folders() - before


def test_a_sandbox_ends_with_the_process_that_wants_its_outcome_and_leaves_nothing() -> None:
    assert not killed_while_waiting()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the deadline ends it")
def test_without_namespaces_too_and_the_folder_is_swept_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = killed_while_waiting(sandbox="none")
    monkeypatch.setattr(sandbox, "_SETTLED_SECONDS", 0)
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


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("a\n```python\nx = 1\n```\nno:\n```py\nx = 2\n```\nso", "x = 2\n"), ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"), ("x = 1", "x = 1"), ("```python3\nx\n```", "x\n"), ("```py3\nx\n```", "x\n"),
        ("``` python\nx\n```", "x\n"), ("```python title=x\nx\n```", "x\n"), ("```{.python}\nx\n```", "x\n"),
        ("~~~python\nx\n~~~", "x\n"), ("~~~\nx\n~~~\n", "x\n"), ("````python\n```\nx\n````", "```\nx\n"),
        ("1. so\n   ```python\n   x\n     y\n   ```\n", "x\n  y\n"), ("\t```python\n\tx\n\t```", "x\n"),
        ("```python\r\nx\r\ny\r\n```\r\n", "x\ny\n"), ("So: ```python\nx\n```", "x\n"),
        ("```python\nx\n```\n```bash\npip\n```\nso", "x\n"), ("```bash\npip\n```\nso\n```python\nx\n```", "x\n"),
        ("```bash\npip\n```\nso", "```bash\npip\n```\nso"), ("```python\nx = '```'\n```", "x = '```'\n"),
        # named ones before others, whole ones before those that are cut off
        ("```python\nx\n```\nprints\n```\n3\n```", "x\n"), ("```\n3\n```\n```python\nx", "x"),
        ("```python\nx\n```\n```python\ny", "x\n"), ("```\nx\n```\n```\ny", "x\n"),
        ("```python:main.py\nx\n```", "x\n"), ("```python,linenums\nx\n```", "x\n"), ("```ipython3\nx\n```", "x\n"),
        ("```main.py\nx\n```", "x\n"), ("```py\nx\n```\n```python-console\n>>> y\n```", "x\n"),
        ("> ```python\n> x\n>   y\n> ```\nso", "x\n  y\n"), ("> ```python\nx > y\n> ```\nso", "x > y\n"),
        ("```python\rx\ry\r```\r", "x\ny\n"),
        ("<think>\n```python\ny\n```\n</think>\n```\nx\n```", "x\n"), ("```python\ny\n```</think>x", "x"),
        ("```python\nx\n```\n<think>```python\ny\n```</think>", "x\n"), ("<think>\n```python\ny\n```", ""),
    ],
)  # fmt: skip
def test_the_last_block_is_the_program(text: str, program: str) -> None:
    assert extract_code(text) == program


ADD = "def add(a, b):\n    return a + b\n"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
READ = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("tests", "right", "wrong"),
    [
        ("assert add(1, 2) == 3", ADD, ADD.replace("+", "-")),
        ('["assert add(1, 2) == 3"]', ADD, ADD.replace("+", "-")),
        ("def check(f):\n    assert f(1, 2) == 3\ncheck(add)", ADD, ADD.replace("+", "-")),
        ('[{"input": "1 2\\n", "output": "3\\n", "type": "stdin_stdout"}]', READ, READ.replace("int", "ord")),
        ({"inputs": ["1 2", "2 2"], "outputs": ["3", "4.0"]}, READ, "print(3)"),
        ({"inputs": [["1 2", "7"]], "outputs": [["3"]]}, READ, "print(3, 7)"),
        ('{"inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]], "fn_name": "add"}', METHOD, "add = max"),
        ({"inputs": [[[1], [2]]], "outputs": [[1, 2]], "fn_name": "add"}, "def add(*a): return (1, 2)", "add = max"),
        (
            [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}],
            ADD,
            METHOD[:20],
        ),
        ([{"input": "1\n2", "output": "3", "metadata": '{"func_name": "add"}'}], ADD, "add = max"),
        ("{'inputs': [[1, 2]], 'outputs': [3], 'func_name': 'add'}", ADD, "add = max"),
        ({"inputs": np.array([[1, 2]]), "outputs": np.array([3]), "fn_name": "add"}, ADD, "add = max"),
        ([{"input": [math.inf, 2], "output": [[math.inf]], "fn_name": "add"}], "def add(*a): return [[a[0]]]", ADD),
    ],
)
def test_every_shape_of_tests(tests: Any, right: str, wrong: str) -> None:
    texts = [f"```python\n{program}\n```" for program in (right, wrong)]
    assert unit_tests(prompts=["", ""], completions=texts, tests=[tests] * 2) == [1.0, 0.0]


def test_the_fraction_of_pairs_that_fit() -> None:
    pairs = {"inputs": ["1 2", "2 2"], "outputs": ["3", "4"]}
    assert unit_test_fraction(prompts=[""], completions=["print(3)"], tests=[pairs]) == [0.5]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"tests": "f(2) == 4"},
            "tests has 'f(2) == 4', which checks nothing: every program passes it; give as",
        ),
        ({"tests": ["assert f(1)", "f(2)"]}, "tests has 'f(2)', which checks nothing"),
        ({"tests": "def check(f):\n    assert f(1)"}, "which checks nothing"),
        (
            {"tests": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertTrue(f(1))"},
            "nothing",
        ),
        ({"tests": "1 +"}, "tests has '1 +', which is no Python"),
        ({"tests": '[{"in": "1"}]'}, "tests is or has {'in': '1'}; give assertions"),
        ({"tests": "{}"}, "tests is or has {}"),
        ({"tests": {"inputs": ["1"], "outputs": []}}, "tests is or has {'inputs': "),
        ({"tests": [{"input": "1", "output": None}]}, "tests is or has None"),
        ({"tests": [{"input": [1], "output": 1, "type": "function_call"}]}, "tests is or has {'input'"),
        ({"tests": 5}, "tests is or has 5"),
        ({"tests": "assert True"}, "tests has 'assert True', which checks nothing"),
        ({"tests": "assert 'f'"}, "which checks nothing"),
        ({"tests": "assert (f(1) == 2, 'why')"}, "which checks nothing"),
        ({"tests": "assert f(1)", "setup": 5}, "setup is 5; give Python as text"),
        (
            {"tests": [{"input": [1], "output": [math.nan], "fn_name": "f"}]},
            "tests want [nan] of f, and no value equals NaN",
        ),
        ({"tests": [{"input": [1], "output": 1, "fn_name": "class"}]}, "tests call 'class', which cannot be"),
        ({"tests": [{"input": [1], "output": 1, "fn_name": "a b"}]}, "tests call 'a b', which cannot be"),
        ({"test_list": ["f(2) == 4"]}, "test_list has 'f"),
        ({"test_list": "assert f(2) == 4"}, "test_list is 'assert f(2) == 4'; give a list of texts"),
        ({"test": "def check(f):\n    assert f(1)"}, "entry_point is None; give the name of the function"),
        ({"test": "def check(f):\n    assert f(1)", "entry_point": "class"}, "entry_point is 'class'"),
        ({"test": "def check(f):\n    f(2) == 4", "entry_point": "f"}, "test has 'def check"),
    ],
)
def test_tests_that_would_pass_everything_are_refused_before_training(row: Any, complaint: str) -> None:
    with pytest.raises(EstuneError, match=r"^task t: training row 0: .*; (give|mend|take)") as refused:
        Task("t", [{"prompt": "p", **row}], [], [unit_tests], [1.0], None)
    assert complaint in str(refused.value)


IDLE: list[dict[str, Any]] = [
    {"tests": "if False:\n    assert f(1) == 2"},
    {"tests": "try:\n    assert f(1) == 2\nexcept: pass"},
    {"tests": "if True:\n    def test():\n        assert f(1) == 2"},
    {"tests": "assert f(1) != 2"},
    {"tests": ["assert 1 == 1", "assert sum([1]) == 1"]},
    {"tests": "assert f(1) == 2", "setup": "def f(x): return 2"},
    {"tests": [{"input": "1", "output": "\n"}]},
    {"tests": [{"input": [[1, 2]], "output": 3, "fn_name": "sum"}]},
    {"test": "def check(f):\n    for x in 1, 2: assert callable(f)", "entry_point": "f", "code_prompt": "def f(x):\n"},
]
CHECKING: list[dict[str, Any]] = [
    {"tests": "assert f(1) == 2"},
    {"tests": ["assert f(1) != 2", "assert f(1) == 3"]},
    {"tests": "for x in 1, 2:\n    assert f(x) == x"},
    {"tests": "try:\n    f(1)\n    assert False\nexcept ValueError: pass"},
]


def test_tests_that_programs_that_do_nothing_pass_are_found_before_training() -> None:
    with Grading([unit_tests], processes=2) as grading:
        for row in IDLE:
            task = Task("t", [{"prompt": "p", **row}], [], [unit_tests], [1.0], None)
            with pytest.raises(EstuneError, match=r"task t: unit_tests gives 1 to a completion of training row 0 that"):
                preflight(task, grading)
        for row in CHECKING:
            assert preflight(Task("t", [{"prompt": "p", **row}], [], [unit_tests], [1.0], None), grading) == 0


def test_nothing_is_run_for_tests_that_are_seen_to_check() -> None:
    assert [bool(worthless(row)) for row in (*IDLE, *CHECKING)] == [True] * 9 + [False] * 2 + [True] * 2


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("1  2\n3 \n\n", "1 2\n3", True), ("1 2 3", "1 2\n3", False), ("a", "A", False),
        ("3.0", "3", True), ("+3", "3.0", True), ("-0", "0", True), (".5", "0.50", True), ("1e2", "100", True),
        ("3.0000001", "3", False), ("0.3333333", "0.33333333", True), ("0.3333", "0.33333333", False),
        ("1000000.5", "1000000.0", True), ("1000002", "1000000.0", False), ("1e9999", "1e8888", False),
        ("1_000", "1000", False), ("1_000.0", "1000.0", False), ("\uff11\uff12", "12", False), ("nan", "NaN", False),
        ("0x10", "16", False), ("inf", "inf", True), ("1" * 200, "1" * 200, True),
    ],
)  # fmt: skip
def test_outputs_are_compared_as_judges_do(printed: str, wanted: str, same: bool) -> None:
    assert same_output(printed, wanted) is same


def test_rows_of_the_two_common_data_sets() -> None:
    human = {
        "prompt": "...",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n",
        "code_prompt": "from typing import List\n\ndef add(a, b):\n",
    }
    good = "```python\ndef add(a, b):\n    return a + b\n```"
    bad = good.replace("+", "-")
    body = "    return a + b\n"
    with Grading([unit_tests], processes=1) as grading:
        assert grading.pool is not None
        texts = [Completion(text, [], True) for text in (good, bad, body, "```python\nimport sys; sys.exit()\n```")]
        assert grading.grade([human] * 4, texts).total == [1.0, 0.0, 1.0, 0.0]
    mbpp: dict[str, Any] = {"test_list": ["assert f(1) == one", "assert f(2) == 3"], "test_setup_code": "one = 1"}
    columns = {key: [value] for key, value in mbpp.items()}
    program = ["```python\ndef f(x): return x\n```"]
    assert unit_test_fraction(prompts=["..."], completions=program, **columns) == [0.5]
    assert unit_tests(prompts=["..."], completions=program, **columns) == [0.0]
    assert unit_tests(prompts=["..."], completions=program, test_list=[None]) == [None]
    own = {"tests": ["assert f(9) == 3.0"], "setup": ["from math import sqrt\n"]}
    assert unit_tests(prompts=["..."], completions=["```python\ndef f(x): return sqrt(x)\n```"], **own) == [1.0]
    own["setup"] = ["from math import sqrt"]  # without an end of line
    assert unit_tests(prompts=["..."], completions=["```python\ndef f(x): return sqrt(x)\n```"], **own) == [1.0]
    arrays = {key: [np.array(value) if key == "test_list" else value] for key, value in mbpp.items()}
    assert unit_test_fraction(prompts=["..."], completions=program, **arrays) == [0.5]
    with pytest.raises(EstuneError, match="unit tests need the columns"):
        unit_tests(prompts=["..."], completions=program, answer=["x"])

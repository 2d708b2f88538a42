"""Programs in answers and what scores them: every shape of tests, and that those which check nothing are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.rewards.code import unit_test_fraction, unit_tests, worthless
from estune.rewards.programs import extract_code, same_output
from estune.tasks.base import Task
from estune.tasks.preflight import preflight
from tests.sandboxes import available

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.skipif(not available(), reason="this system does not allow namespaces"),
]


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

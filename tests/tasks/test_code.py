"""The code task: rows of MBPP and HumanEval, whose own solutions pass and whose wrong ones do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.tasks.base import Task
from estune.tasks.code import CodeConfig
from tests.tasks.scores import scores

pytestmark = pytest.mark.usefixtures("sandboxes_alone")

MBPP = [
    {"task_id": n, "text": f"Write a function that adds {n}.", "code": f"def add(x):\r\n    return x + {n}",
     "test_list": [f"assert add(1) == {n + 1}", f"assert add(OTHER) == {n + 5}"], "test_setup_code": "OTHER = 5"}
    for n in range(3)
]  # fmt: skip
HUMAN_EVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n    """The largest."""\n',
        "canonical_solution": "    return max(numbers)\n",
        "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1]) == -1\n",
        "entry_point": "largest",
    }
]


def build(folder: Path, train: Any = MBPP, evaluation: Any = HUMAN_EVAL) -> Task:
    names = []
    for name, rows in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(folder / f"{name}.jsonl"))
    return CodeConfig(data=names[0], eval_data=names[1]).build(0)


def test_both_shapes_make_rows_of_the_same_columns(tmp_path: Path) -> None:
    task = build(tmp_path)
    assert task.train[0].keys() == task.evaluation[0].keys()
    assert "Write a function that adds 0." in task.train[0]["prompt"][0]["content"]
    assert "assert add(1) == 1" in task.train[0]["prompt"][0]["content"]
    assert "def largest(" in task.evaluation[0]["prompt"][0]["content"]
    assert "return max" not in task.evaluation[0]["prompt"][0]["content"]


def test_solutions_pass_and_others_do_not(tmp_path: Path) -> None:
    task = build(tmp_path)
    assert task.gold is not None
    rows = [*task.train[:2], *task.evaluation]
    gold = [str(task.gold(row)) for row in rows]
    assert scores(task, rows, gold) == [1.0, 1.0, 1.0]
    assert scores(task, rows, [gold[1], gold[0], gold[2].replace("max", "min")]) == [0.0, 0.0, 0.0]
    assert scores(task, task.evaluation, ["```python\ndef largest(n):\n    return sorted(n)[-1]\n```"]) == [1.0]


def test_rows_with_tests_of_their_own(tmp_path: Path) -> None:
    pairs = json.dumps([{"input": "1 2", "output": "3", "type": "stdin_stdout"}])
    call = {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}
    rows = [
        {"problem": "Add two numbers.", "tests": pairs, "solution": "print(sum(map(int, input().split())))"},
        {"problem": "Sum up.", "tests": json.dumps(call), "solution": "def add(a, b): return a + b"},
        {"problem": "Join.", "tests": json.dumps("assert add(1, 2) == 3"), "solution": "def add(a, b): return a + b"},
    ]
    task = build(tmp_path, train=rows)
    prompts = [row["prompt"][0]["content"] for row in task.train]
    for prompt, told in zip(prompts, ("standard input", "function is `add`", "assert add(1, 2) == 3"), strict=True):
        assert told in prompt
    assert task.gold is not None
    assert scores(task, task.train, [str(task.gold(row)) for row in task.train]) == [1.0, 1.0, 1.0]
    assert scores(task, task.train, ["print(4)"] * 3) == [0.0, 0.0, 0.0]


def test_the_function_s_name_may_stand_in_a_column_of_its_own(tmp_path: Path) -> None:
    """As LiveCodeBench has it, as JSON text."""
    tests = json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}])
    rows = [{"problem": "Add.", "tests": tests, "metadata": json.dumps({"func_name": "add"})}]
    task = build(tmp_path, train=rows)
    assert "The function is `add`." in task.train[0]["prompt"][0]["content"]
    programs = ["```python\ndef add(a, b): return a + b\n```", "```python\ndef add(a, b): return a - b\n```"]
    assert scores(task, task.train * 2, programs) == [1.0, 0.0]


def test_lists_may_be_json_text(tmp_path: Path) -> None:
    row = {**MBPP[0], "test_list": json.dumps(MBPP[0]["test_list"]), "test_imports": '["import math"]'}
    plain = build(tmp_path)
    task = build(tmp_path, train=[row])
    assert task.train[0] == plain.train[0]


def test_tests_that_can_be_forged_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path)
    assert not caplog.records
    loops = "def check(candidate):\n    for n in (1, 2):\n        assert candidate([n]) == n\n"
    rows = [{**MBPP[0], "test_list": ["assert add(1) == 1", "assert add(1) == add(0) + 1"]}, *MBPP[1:]]
    build(tmp_path, rows, [{**HUMAN_EVAL[0], "test": loops}])
    assert [record.getMessage() for record in caplog.records] == [
        "task code: 1 of 6 training tests run where the program could forge their pass: see docs/security.md",
        "task code: 1 of 1 evaluation tests run where the program could forge their pass: see docs/security.md",
    ]


def test_packages_that_programs_may_import(tmp_path: Path) -> None:
    plain = build(tmp_path)
    task = CodeConfig(
        data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "eval.jsonl"), packages="iniconfig, pluggy"
    ).build(0)
    program = "```python\nimport iniconfig, pluggy\ndef add(x): return x\n```"
    assert scores(task, task.train[:1], [program]) == [1.0]
    assert scores(plain, plain.train[:1], [program]) == [0.0]


def test_the_split_where_only_one_set_is_given(tmp_path: Path) -> None:
    rows = [{**MBPP[0], "text": f"Write number {n}."} for n in range(60)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = CodeConfig(data=str(path), eval_data=None).build(0)
    assert len(task.train) + len(task.evaluation) == 60


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{**MBPP[0], "test_list": "assert"}], "row 1: test_list is 'assert'; give a list"),
        ([{**MBPP[0], "text": ""}], "row 1: text is ''"),
        ([{"entry_point": "f", "prompt": "def f():"}], "no column test; there are entry_point, prompt"),
        ([{**HUMAN_EVAL[0], "test": None}], "row 1: test is None"),
        ([{"problem": "p", "tests": []}], r"row 1: tests is \[\]; give at least one"),
        ([{**MBPP[0], "test_imports": "import math"}], "row 1: test_imports is 'import math'; give a list"),
        ([{"problem": "p", "tests": "f(1) == 2"}], "row 1: tests has 'f.1. == 2', which checks nothing"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: Any, complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        build(tmp_path, train=rows)

"""Rewards for code: the program in a completion must pass the row's tests. In a sandbox, and in a grader process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from estune.errors import EstuneError
from estune.grading.isolation import isolated
from estune.grading.sandbox import Isolation, Limits, run_code
from estune.rewards.text import Text, as_text

_COLUMNS = ("tests", "setup", "test_list", "test_setup_code", "test", "entry_point", "code_prompt")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def extract_code(text: str) -> str:
    """The last block between ``` and ```; the whole text where there is none."""
    blocks: list[str] = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


@isolated(deadline=30.0)
def unit_tests(*, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """1.0 where the program passes all tests of its row, else 0.0; None for a row without tests.

    The program is the last block between ``` of the completion. Columns read are one of these groups:

    - `tests`, a text or a list of such, and `setup`, put before the program, where there is one.
    - MBPP's `test_list`, and `test_setup_code`, put before each test, where there is one.
    - HumanEval's `test`, which defines `check(candidate)`, and `entry_point`, the function's name. `code_prompt`, where
      there is one, is put before a program that does not define the function itself.

    Raises:
        EstuneError: other columns, or a system without sandboxes.
    """
    return [None if score is None else float(score == 1.0) for score in _scores(completions, columns)]


@isolated(deadline=30.0)
def unit_test_fraction(*, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """The fraction of the tests that pass, with the columns of `unit_tests`. HumanEval's `check` is a single test."""
    return _scores(completions, columns)


def passed_fraction(
    program: str, tests: Sequence[str], *, limits: Limits | None = None, sandbox: Isolation = "namespaces"
) -> float:
    """Share of the tests that the program passes, for rewards of your own."""
    return run_code(program, tests=tests, limits=limits, sandbox=sandbox).passed / len(tests)


def _scores(completions: Sequence[Text], columns: dict[str, Any]) -> list[float | None]:
    if not (
        {"tests"} <= columns.keys() or {"test_list"} <= columns.keys() or {"test", "entry_point"} <= columns.keys()
    ):
        raise EstuneError("unit tests need the columns tests, or test_list, or test and entry_point; rename the data's")
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        program = extract_code(as_text(completion))
        row = {name: columns[name][i] for name in _COLUMNS if name in columns}
        tests: list[str] = [row["tests"]] if isinstance(row.get("tests"), str) else row.get("tests") or []
        if tests:
            program = f"{row.get('setup') or ''}\n{program}"
        elif row.get("test_list"):
            tests = [f"{row.get('test_setup_code') or ''}\n{test}" for test in row["test_list"]]
        elif row.get("test"):
            entry = row["entry_point"]
            tests = [f"{row['test']}\ncheck({entry})"]
            if not re.search(rf"^def {re.escape(entry)}\b", program, re.MULTILINE):
                program = (row.get("code_prompt") or "") + program
        scores.append(passed_fraction(program, tests) if tests else None)
    return scores

"""Rewards for code: the program in a completion must pass the row's tests. In a sandbox, and in a grader process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estune.errors import EstuneError
from estune.grading.isolation import isolated
from estune.grading.sandbox import Isolation, Limits, run_code
from estune.grading.sealed import seal
from estune.rewards.text import Text, as_text

_COLUMNS = ("tests", "setup", "test_list", "test_setup_code", "test", "entry_point", "code_prompt", "packages")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def extract_code(text: str) -> str:
    """The last block between ``` and ```; the whole text where there is none."""
    blocks: list[str] = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


@isolated(deadline=30.0, errors_as_crashes=True)
def unit_tests(*, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """1.0 where the program passes all tests of its row, else 0.0; None for a row without tests.

    The program is the last block between ``` of the completion. Columns read are one of these groups:

    - `tests`, a text or a list of such, and `setup`, put before the program, where there is one.
    - MBPP's `test_list`, and `test_setup_code`, put before each test, where there is one.
    - HumanEval's `test`, which defines `check(candidate)`, and `entry_point`, the function's name. `code_prompt`, where
      there is one, is put before a program that does not define the function itself.

    With any of them, `packages`: a list of installed packages that the program may import beside the standard library.

    A program cannot forge a pass of a test whose shape `estune.grading.sealed` knows: what is expected stays in this
    process. `unsealed_tests` counts the others.

    Raises:
        EstuneError: other columns, a package that is not installed, or a system without sandboxes.
    """
    return [None if score is None else float(score == 1.0) for score in _scores(completions, columns)]


@isolated(deadline=30.0, errors_as_crashes=True)
def unit_test_fraction(*, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """The fraction of the tests that pass, with the columns of `unit_tests`. HumanEval's `check` is a single test."""
    return _scores(completions, columns)


def passed_fraction(
    program: str,
    tests: Sequence[str],
    *,
    setup: str = "",
    packages: Sequence[str] = (),
    limits: Limits | None = None,
    sandbox: Isolation = "namespaces",
) -> float:
    """Share of the tests that the program passes, for rewards of your own; the arguments are those of `run_code`."""
    found = run_code(program, setup=setup, tests=tests, packages=packages, limits=limits, sandbox=sandbox)
    return found.passed / len(tests)


def unsealed_tests(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Of how many tests a program could forge the pass, and how many there are, in rows with `unit_tests`' columns."""
    found = [seal(test, tests.setup) for row in rows for tests in [_tests(row)] for test in tests.tests]
    return sum(test is None for test in found), len(found)


@dataclass(frozen=True, slots=True)
class _Tests:
    """What comes before the program, and what after it; `head` only before a program that does not define `entry`."""

    setup: str
    tests: list[str]
    head: str = ""
    entry: str = ""


def _tests(row: dict[str, Any]) -> _Tests:
    if row.get("tests"):
        return _Tests(row.get("setup") or "", [row["tests"]] if isinstance(row["tests"], str) else list(row["tests"]))
    if row.get("test_list"):
        return _Tests("", [f"{row.get('test_setup_code') or ''}\n{test}" for test in row["test_list"]])
    if row.get("test"):
        entry = row["entry_point"]
        return _Tests("", [f"{row['test']}\ncheck({entry})"], row.get("code_prompt") or "", entry)
    return _Tests("", [])


def _scores(completions: Sequence[Text], columns: dict[str, Any]) -> list[float | None]:
    if not (
        {"tests"} <= columns.keys() or {"test_list"} <= columns.keys() or {"test", "entry_point"} <= columns.keys()
    ):
        raise EstuneError("unit tests need the columns tests, or test_list, or test and entry_point; rename the data's")
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        program = extract_code(as_text(completion))
        row = {name: columns[name][i] for name in _COLUMNS if name in columns}
        found = _tests(row)
        if found.head and not re.search(rf"^def {re.escape(found.entry)}\b", program, re.MULTILINE):
            program = found.head + program
        packages = row.get("packages") or ()
        scores.append(
            passed_fraction(program, found.tests, setup=found.setup, packages=packages) if found.tests else None
        )
    return scores

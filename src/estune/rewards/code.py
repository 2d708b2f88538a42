"""Rewards for code: the program in a completion must pass the row's tests. In a sandbox, and in a grader process."""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence
from typing import Any

from estune.errors import EstuneError
from estune.grading.convention import checked, share
from estune.grading.isolation import isolated
from estune.grading.sandbox import Isolation, Limits, run_code
from estune.grading.sealed import seal
from estune.rewards.idle import free_names, is_decisive, stub
from estune.rewards.programs import COLUMNS, Tests, extract_code, same_output, tests_of
from estune.rewards.text import Text, as_text


@share
@checked(tests_of)
@isolated(deadline=30.0, errors_as_crashes=True)
def unit_tests(*, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
    """1.0 where the program passes all tests of its row, else 0.0; None for a row without tests.

    The program is the last Python block between ``` or ~~~ of the completion. Columns read are one of these groups:

    - `tests`, and `setup`, put before the program, where there is one. Tests are assertions, a text or a list of such;
      or what goes in and has to come out, through standard input and output or, where a `fn_name` is given, by a call:
      a list of `{input, output}`, or `{inputs, outputs}` with a list each. All may be JSON text.
    - MBPP's `test_list`, and `test_setup_code`, put before each test, where there is one.
    - HumanEval's `test`, which defines `check(candidate)`, and `entry_point`, the function's name. `code_prompt`, where
      there is one, is put before a program that does not define the function itself.

    With any of them, `packages`: a list of installed packages that the program may import beside the standard library.

    A program cannot forge a pass of a test whose shape `estune.grading.sealed` knows: what is expected stays in this
    process. `unsealed_tests` counts the others.

    Raises:
        EstuneError: other columns, tests of another shape or that check nothing, a package that is not installed, or a
            system without sandboxes.
    """
    return [None if score is None else float(score == 1.0) for score in _scores(completions, columns, all_of_them=True)]


@share
@checked(tests_of)
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
    """How many tests a program could forge a pass of, and how many there are, in rows with `unit_tests`' columns."""
    all_tests = [tests_of(row) for row in rows]
    found = [seal(test, tests.setup) for tests in all_tests for test in tests.asserts]
    # What a pair wants stays out of the sandbox, whatever it is.
    return sum(test is None for test in found), len(found) + sum(len(tests.pairs) for tests in all_tests)


def worthless(row: dict[str, Any]) -> list[str]:
    """Completions whose programs do nothing, graded before training to find tests that check nothing.

    One program is empty, the other defines what the tests call. There are none if such programs are sure to fail.
    """
    tests = tests_of(row)
    names = {pair.function for pair in tests.pairs if pair.function}
    if (
        any(pair.wanted.strip() for pair in tests.pairs if not pair.function)
        or any(not hasattr(builtins, name) for name in names)
        or any(is_decisive(test, tests.setup) for test in tests.asserts)
        or not (tests.pairs or tests.asserts)
    ):
        return []
    programs = ["", stub(free_names(tests.asserts, tests.setup))]
    return [f"```python\n{program}\n```" for program in programs]


for function in (unit_tests, unit_test_fraction):
    setattr(function, "worthless", worthless)  # noqa: B010 - a function has no such attribute to the type checker


def _scores(completions: Sequence[Text], columns: dict[str, Any], all_of_them: bool = False) -> list[float | None]:
    if not (
        {"tests"} <= columns.keys() or {"test_list"} <= columns.keys() or {"test", "entry_point"} <= columns.keys()
    ):
        raise EstuneError("unit tests need the columns tests, or test_list, or test and entry_point; rename the data's")
    scores: list[float | None] = []
    for i, completion in enumerate(completions):
        program = extract_code(as_text(completion))
        row = {name: columns[name][i] for name in COLUMNS if name in columns}
        found = tests_of(row)
        if found.head and not re.search(rf"^def {re.escape(found.entry)}\b", program, re.MULTILINE):
            program = found.head + program
        packages = row.get("packages") or ()
        packages = packages.split(",") if isinstance(packages, str) else packages
        scores.append(_score(program, found, [name.strip() for name in packages], all_of_them))
    return scores


def _score(program: str, tests: Tests, packages: Sequence[str], all_of_them: bool) -> float | None:
    """The fraction of the tests that pass. With `all_of_them`, any number below 1 may stand for a failure."""
    asserts = [*tests.asserts, *(pair.as_assertion(program) for pair in tests.pairs if pair.function)]
    pairs = [pair for pair in tests.pairs if not pair.function]
    number = len(asserts) + len(pairs)
    if not number:
        return None
    passed = 0.0
    if asserts:
        share = passed_fraction(program, asserts, setup=tests.setup, packages=packages)
        passed = share * len(asserts)
        if all_of_them and share < 1:
            return 0.0
    for pair in pairs:
        wanted: str = pair.wanted
        limits = Limits(output=max(Limits().output, 2 * len(wanted.encode(errors="replace"))))
        outcome = run_code(program, stdin=pair.given, setup=tests.setup, packages=packages, limits=limits)
        if outcome.status == "passed" and same_output(outcome.stdout, wanted):
            passed += 1
        elif all_of_them:
            return 0.0
    return passed / number

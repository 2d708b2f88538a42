"""Programs in what a model writes, and the tests that they have to pass, in every shape that data sets have."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from estune.errors import EstuneError

COLUMNS = ("tests", "setup", "test_list", "test_setup_code", "test", "entry_point", "code_prompt", "packages")
"""What is read of a row."""

_PYTHON = r"(?:python|py)[0-9.]*"
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)$")
_FENCE_IN_LINE = re.compile(rf"(?<![`~])(`{{3,}}|~{{3,}})[ \t]*({_PYTHON})[ \t]*$", re.IGNORECASE)
_LANGUAGE = re.compile(rf"(?:[{{]?\.?{_PYTHON}[}},]?(?:\s.*)?)?", re.IGNORECASE)
_SOLUTION = re.compile(r"^class Solution\b", re.MULTILINE)
_SHAPES = (
    "give assertions, or what goes in and has to come out ([{input, output}, ...] or {inputs, outputs}, with fn_name "
    "for a call), as JSON text or as it is"
)
_LONGEST_NUMBER = 100
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Pair:
    """What a program is given and has to give: texts on standard input and output, or a call's arguments and value."""

    given: Any
    wanted: Any
    function: str = ""

    def as_assertion(self, program: str) -> str:
        """For a call: a test of the program, whose function can be a method of a class `Solution`.

        As in APPS, a value may stand in a list of its own, and a tuple counts as a list.
        """
        function = f"Solution().{self.function}" if _SOLUTION.search(program) else self.function
        alone = isinstance(self.wanted, list) and len(self.wanted) == 1
        wanted = [self.wanted, *(self.wanted if alone else ())]
        wanted += [tuple(value) for value in wanted if isinstance(value, list)]
        return f"assert {function}({', '.join(map(repr, self.given))}) in {wanted!r}"


@dataclass(frozen=True, slots=True)
class Tests:
    """What comes before the program, and what after it; `head` only before a program that does not define `entry`."""

    setup: str = ""
    asserts: Sequence[str] = ()
    head: str = ""
    entry: str = ""
    pairs: Sequence[Pair] = ()


def extract_code(text: str) -> str:
    """The last Python block between ``` or ~~~, or one without a language; the whole text where there is none.

    A block may be indented, and the last one need not be closed.
    """
    found: str | None = None
    block: list[str] = []
    indent = 0
    fence = ""
    is_python = False
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence:
            bare = line.strip()
            if len(bare) >= len(fence) and not bare.strip(fence[0]):
                if is_python:
                    found = "".join(f"{part}\n" for part in block)
                fence = ""
            else:
                block.append(line[min(indent, len(line) - len(line.lstrip())) :])
        elif match := _FENCE.match(line):
            fence = match[2]
            indent = len(match[1])
            is_python = _LANGUAGE.fullmatch(match[3].strip()) is not None
            block = []
        elif match := _FENCE_IN_LINE.search(line):
            fence = match[1]
            indent = 0
            is_python = True
            block = []
    if fence and is_python:
        found = "\n".join(block)
    return text if found is None else found


def tests_of(row: Mapping[str, Any]) -> Tests:
    """The tests of a row, none where it has none.

    Raises:
        EstuneError: they have another shape, or check nothing.
    """
    if row.get("tests"):
        setup = row.get("setup") or ""
        found = _read(row["tests"])
        pairs = [each for each in found if isinstance(each, Pair)]
        asserts = [each for each in found if isinstance(each, str)]
        _refuse_idle("tests", asserts, setup)
        return Tests(setup, asserts, pairs=pairs)
    if row.get("test_list"):
        setup = row.get("test_setup_code") or ""
        _refuse_idle("test_list", row["test_list"], setup)
        return Tests("", [f"{setup}\n{test}" for test in row["test_list"]])
    if row.get("test"):
        entry = row["entry_point"]
        test = f"{row['test']}\ncheck({entry})"
        _refuse_idle("test", [test], "")
        return Tests("", [test], row.get("code_prompt") or "", entry)
    return Tests()


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs have the same words in the same lines; numbers are compared by value."""
    lines = [[line.split() for line in text.strip().split("\n")] for text in (printed, wanted)]
    return len(lines[0]) == len(lines[1]) and all(
        len(one) == len(other) and all(map(_same_word, one, other)) for one, other in zip(*lines, strict=True)
    )


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    if max(len(one), len(other)) > _LONGEST_NUMBER:
        return False
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


def _read(tests: Any) -> list[str | Pair]:
    """Assertions and pairs, from text, JSON text, a dictionary of lists, or a list."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{", '"'):
        with suppress(ValueError, RecursionError):
            decoded = json.loads(tests)
            tests = [decoded] if isinstance(decoded, str) else decoded
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping):
        tests = list(_rows(tests))
    if not isinstance(tests, list | tuple) or not tests:
        raise _refused(tests)
    return [test if isinstance(test, str) else _pair(test) for test in tests]


def _rows(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One test after the other, of `inputs` and `outputs`, or `input` and `output`, in lists."""
    inputs = table.get("inputs", table.get("input"))
    outputs = table.get("outputs", table.get("output"))
    if isinstance(inputs, str) and isinstance(outputs, str):
        inputs, outputs = [inputs], [outputs]
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        raise _refused(table)
    for given, wanted in zip(inputs, outputs, strict=True):
        yield {"input": given, "output": wanted, "fn_name": table.get("fn_name")}


def _pair(test: Any) -> Pair:
    if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
        raise _refused(test)
    given = test["input"]
    wanted = test["output"]
    more = test.get("metadata")
    function = test.get("fn_name") or test.get("func_name")
    if not function and isinstance(more, Mapping):
        function = more.get("fn_name") or more.get("func_name")
    if not function:
        if "func" in str(test.get("type") or test.get("testtype") or ""):
            raise _refused(test)
        return Pair(_lines(given), _lines(wanted))
    if not str(function).isidentifier():
        raise _refused(test)
    if isinstance(given, str):
        # LiveCodeBench: one argument a line, each as JSON.
        given = [_json(line) for line in given.split("\n") if line.strip()]
        wanted = _json(wanted)
    if isinstance(given, Mapping):
        given = list(given.values())
    if not isinstance(given, list | tuple):
        raise _refused(test)
    return Pair(list(given), wanted, str(function))


def _lines(text: Any) -> str:
    """What goes through standard input or output: text, lines of it, or a number."""
    if isinstance(text, list | tuple):
        return "\n".join(map(_lines, text))
    if isinstance(text, str | int | float):
        return str(text)
    raise _refused(text)


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _refuse_idle(column: str, tests: Sequence[Any], setup: str) -> None:
    """Refuse tests that are no Python, or check nothing, so that every program would pass them."""
    checking = {"main", "run"}  # unittest's
    with suppress(SyntaxError, ValueError):
        checking.update(_checking(ast.parse(setup)))
    for test in tests:
        try:
            tree = ast.parse(test)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise EstuneError(
                f"{column} has {test!r:.80}, which is no Python ({type(error).__name__}); {_SHAPES}"
            ) from error
        if not _checks(tree, checking | set(_checking(tree))):
            raise EstuneError(f"{column} has {test!r:.80}, which checks nothing: every program passes it; {_SHAPES}")


def _checking(tree: ast.Module) -> Iterator[str]:
    """Names of functions and classes that check something where they are called."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and any(
            map(_is_check, ast.walk(node))
        ):
            yield node.name


def _checks(tree: ast.Module, checking: set[str]) -> bool:
    """Whether something is checked when this runs: definitions alone do nothing."""
    nodes = [node for statement in tree.body if not isinstance(statement, _DEFINITIONS) for node in ast.walk(statement)]
    calls = {_called(node) for node in nodes if isinstance(node, ast.Call)}
    return any(map(_is_check, nodes)) or not calls.isdisjoint(checking)


def _is_check(node: ast.AST) -> bool:
    """An `assert`, a `raise`, or a call of what is named like one: `self.assertEqual`, `assert_allclose`, `fail`."""
    if isinstance(node, ast.Call):
        return _called(node).lower().startswith(("assert", "fail"))
    return isinstance(node, ast.Assert | ast.Raise)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(name) | ast.Attribute(attr=name):
            return str(name)
    return ""


def _refused(value: Any) -> EstuneError:
    return EstuneError(f"tests is or has {value!r:.80}; {_SHAPES}")

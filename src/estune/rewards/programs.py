"""Programs in completions, and the tests that they have to pass, in all the shapes that data sets have."""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from estune.errors import EstuneError
from estune.rewards.idle import SHAPES, refuse_idle
from estune.rewards.text import without_thoughts

COLUMNS = (
    "tests",
    "metadata",
    "setup",
    "test_list",
    "test_setup_code",
    "test",
    "entry_point",
    "code_prompt",
    "packages",
)
"""Columns of a row that are read."""

_PYTHON = r"(?:ipython|python|py)[0-9.]*"
_QUOTED = re.compile(r"\A(?:[ \t]*>){1,3} ?")
_FENCE = re.compile(r"((?:[ \t]*>){0,3}[ \t]*)(`{3,}|~{3,})[ \t]*([^`]*)$")
_FENCE_IN_LINE = re.compile(rf"(?<![`~])(`{{3,}}|~{{3,}})[ \t]*({_PYTHON})[ \t]*$", re.IGNORECASE)
# After the name: `python:main.py`, `python,linenums`, `python title=x`; but not `python-console`. Or a file's name.
_LANGUAGE = re.compile(rf"[{{]?\.?{_PYTHON}(?:[^\w+-].*)?|\S+\.py", re.IGNORECASE)
_SOLUTION = re.compile(r"^class Solution\b", re.MULTILINE)
_ENTRY = re.compile(r"[^\W\d]\w*(?:\(\))?(?:\.[^\W\d]\w*)*")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?P<point>\.[0-9]*)?|(?P<bare>\.[0-9]+))(?P<power>[eE][+-]?[0-9]{1,4})?")
_LONGEST_NUMBER = 100
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Pair:
    """An input and the output that it must lead to: texts on standard input and output, or arguments and a value."""

    given: Any
    wanted: Any
    function: str = ""

    def as_assertion(self, program: str) -> str:
        """A call's test of a program, whose function may be a method of a class `Solution`.

        As in APPS, a value may stand in a list of its own, and a tuple counts as a list.
        """
        function = f"Solution().{self.function}" if _SOLUTION.search(program) else self.function
        alone = isinstance(self.wanted, list) and len(self.wanted) == 1
        wanted = [self.wanted, *(self.wanted if alone else ())]
        wanted += [tuple(value) for value in wanted if isinstance(value, list)]
        return f"assert {function}({', '.join(map(_source, self.given))}) in {_source(wanted)}"


@dataclass(frozen=True, slots=True)
class Tests:
    """What comes before the program, and what after it; `head` only before a program that does not define `entry`."""

    setup: str = ""
    asserts: Sequence[str] = ()
    head: str = ""
    entry: str = ""
    pairs: Sequence[Pair] = ()


def extract_code(text: str) -> str:
    """The last block of a text between ``` or ~~~ that is marked as Python's; the whole text if there is no block.

    If no block is so marked, it is the last one without a language. A block may be indented or quoted (`> `), and the
    last one need not be closed if no other is. Thoughts, `<think>...</think>`, are not part of the answer.
    """
    text = without_thoughts(text).replace("\r\n", "\n").replace("\r", "\n")
    found: dict[tuple[bool, bool], str] = {}  # the last of each: named, closed
    block: list[str] = []
    indent = 0
    fence = ""
    quoted = False
    named: bool | None = None  # None: another language's
    for line in text.split("\n"):
        inner = _QUOTED.sub("", line, count=1) if fence and quoted else line
        if fence:
            bare = inner.strip()
            if len(bare) >= len(fence) and not bare.strip(fence[0]):
                if named is not None:
                    found[named, True] = "".join(f"{part}\n" for part in block)
                fence = ""
            else:
                block.append(inner[min(indent, len(inner) - len(inner.lstrip())) :])
        elif match := _FENCE.match(line):
            quoted = ">" in match[1]
            indent = len(_QUOTED.sub("", match[1], count=1))
            fence = match[2]
            language = match[3].strip()
            named = True if _LANGUAGE.fullmatch(language) else None if language else False
            block = []
        elif match := _FENCE_IN_LINE.search(line):
            quoted = False
            indent = 0
            fence = match[1]
            named = True
            block = []
    if fence and named is not None:
        found[named, False] = "\n".join(block)
    return found[max(found)] if found else text


def tests_of(row: Mapping[str, Any]) -> Tests:
    """The tests of a row, which may be none.

    Raises:
        EstuneError: they have another shape, or check nothing.
    """
    held = {name: _plain(row.get(name)) for name in COLUMNS}
    if held["tests"]:
        setup = _text(held, "setup")
        found = _read(with_function(held["tests"], held["metadata"]))
        asserts = [each for each in found if isinstance(each, str)]
        refuse_idle("tests", asserts, setup)
        return Tests(setup, asserts, pairs=[each for each in found if isinstance(each, Pair)])
    if held["test_list"]:
        setup = _text(held, "test_setup_code")
        asserts = text_list(held["test_list"], "test_list")
        refuse_idle("test_list", asserts, setup)
        return Tests("", [f"{setup}\n{test}" for test in asserts])
    if held["test"]:
        entry = held["entry_point"]
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry) or _has_keyword(entry):
            raise EstuneError(f"entry_point is {entry!r:.80}; give the name of the function that test checks")
        test = f"{_text(held, 'test')}\ncheck({entry})"
        refuse_idle("test", [test], "")
        return Tests("", [test], _text(held, "code_prompt"), entry)
    return Tests()


def text_list(value: Any, column: str) -> list[str]:
    """A column's list of texts, which may be an array, or the list's JSON text.

    Raises:
        EstuneError: it is something else.
    """
    found = _decoded(_plain(value))
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise EstuneError(f"{column} is {value!r:.80}; give a list of texts")
    return found


def with_function(tests: Any, metadata: Any) -> Any:
    """Tests, each with the name of the function that it calls, which LiveCodeBench tells in a column `metadata`."""
    name = _function({"metadata": metadata})
    found = _decoded(tests) if name else None
    if isinstance(found, Mapping):
        return {**found, "fn_name": _function(found) or name}
    if isinstance(found, list | tuple) and all(isinstance(test, Mapping) for test in found):
        return [{**test, "fn_name": _function(test) or name} for test in found]
    return tests


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs have the same words in the same lines.

    A number, written in ASCII digits, is the same as one of equal value; one that is wanted with a point or an exponent
    may be off by 1e-6, or by 1e-6 of itself, as in testlib's `rcmp6`.
    """
    lines = [[line.split() for line in text.strip().split("\n")] for text in (printed, wanted)]
    return len(lines[0]) == len(lines[1]) and all(
        len(one) == len(other) and all(map(_same_word, one, other)) for one, other in zip(*lines, strict=True)
    )


def _same_word(printed: str, wanted: str) -> bool:
    if printed == wanted:
        return True
    if max(len(printed), len(wanted)) > _LONGEST_NUMBER:
        return False
    numbers = _NUMBER.fullmatch(printed), _NUMBER.fullmatch(wanted)
    if numbers[0] is None or numbers[1] is None:
        return False
    if not any(numbers[1].groups()):
        return Decimal(printed) == Decimal(wanted)
    one = float(printed)
    return math.isfinite(one) and math.isclose(one, float(wanted), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _read(tests: Any) -> list[str | Pair]:
    """Assertions and pairs, from text, JSON text, a dictionary of lists, or a list."""
    tests = _decoded(tests)
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping):
        tests = list(_rows(tests))
    if not isinstance(tests, list | tuple) or not tests:
        raise _refused(tests)
    return [test if isinstance(test, str) else _pair(test) for test in tests]


def _decoded(value: Any) -> Any:
    """What a text holds that is JSON or a Python literal; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{", '"'):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return read(value.strip())
    return value


def _plain(value: Any) -> Any:
    """A value with lists in the place of the arrays that pandas has."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _text(row: Mapping[str, Any], column: str) -> str:
    """A column's text, which may come as a list of lines; empty if the column is missing."""
    value = row[column] or ""
    if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise EstuneError(f"{column} is {value!r:.80}; give Python as text")
    return value


def _rows(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tests one by one, from lists under `inputs` and `outputs`, or `input` and `output`."""
    inputs = table.get("inputs", table.get("input"))
    outputs = table.get("outputs", table.get("output"))
    if isinstance(inputs, str) and isinstance(outputs, str):
        inputs = [inputs]
        outputs = [outputs]
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple) or len(inputs) != len(outputs):
        raise _refused(table)
    for given, wanted in zip(inputs, outputs, strict=True):
        yield {"input": given, "output": wanted, "fn_name": _function(table)}


def _function(test: Mapping[str, Any]) -> str:
    """The name of the function that a test calls, which may stand in its `metadata`, an object or its JSON text."""
    more = _decoded(test.get("metadata"))
    for held in (test, more if isinstance(more, Mapping) else {}):
        name = held.get("fn_name") or held.get("func_name")
        if name:
            return str(name)
    return ""


def _pair(test: Any) -> Pair:
    if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
        raise _refused(test)
    given = test["input"]
    wanted = test["output"]
    function = _function(test)
    if not function:
        if "func" in str(test.get("type") or test.get("testtype") or ""):
            raise _refused(test)
        return Pair(_lines(given), _lines(wanted))
    if not function.isidentifier() or keyword.iskeyword(function):
        raise EstuneError(f"tests call {function!r:.80}, which cannot be a function's name; mend fn_name")
    if isinstance(given, str):
        # LiveCodeBench: one argument a line, each as JSON.
        given = [_json(line) for line in given.split("\n") if line.strip()]
        wanted = _json(wanted)
    if isinstance(given, Mapping):
        given = list(given.values())
    if not isinstance(given, list | tuple):
        raise _refused(test)
    if _has_nan(wanted):
        raise EstuneError(f"tests want {wanted!r:.80} of {function}, and no value equals NaN; take the test out")
    _source([given, wanted])
    return Pair(list(given), wanted, function)


def _source(value: Any) -> str:
    """A value as Python's source text.

    Raises:
        EstuneError: it is of a kind that has no literals.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, list):
        return f"[{', '.join(map(_source, value))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{_source(item)}, ' for item in value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_source(key)}: {_source(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | set | frozenset):
        return repr(value)
    raise _refused(value)


def _has_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)


def _has_keyword(entry: str) -> bool:
    return any(map(keyword.iskeyword, entry.replace("()", "").split(".")))


def _lines(text: Any) -> str:
    """Text for standard input or output, from text, a list of lines, or a number."""
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


def _refused(value: Any) -> EstuneError:
    return EstuneError(f"tests is or has {value!r:.80}; {SHAPES}")

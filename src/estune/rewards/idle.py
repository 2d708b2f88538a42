"""Tests that check nothing: programs that do nothing pass them, so that nothing can be learned from them."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from estune.errors import EstuneError
from estune.grading.sealed import seal

SHAPES = (
    "give assertions, or what goes in and has to come out ([{input, output}, ...] or {inputs, outputs}, with fn_name "
    "for a call), as JSON text or as it is"
)
"""What tests may be, for a message."""

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BUILT_IN = frozenset(dir(builtins))
_STUB = """\
class Anything:
    def __call__(self, *values, **named): return self
    def __getattr__(self, name): return self
    def __bool__(self): raise TypeError
"""


def refuse_idle(column: str, tests: Sequence[str], setup: str) -> None:
    """Refuse tests that are no Python, or that visibly check nothing.

    Raises:
        EstuneError: there is such a test; the message names the column.
    """
    checking = {"main", "run"}  # unittest's
    with suppress(SyntaxError, ValueError):
        checking.update(_checking(ast.parse(setup)))
    for test in tests:
        try:
            tree = ast.parse(test)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise EstuneError(
                f"{column} has {test!r:.80}, which is no Python ({type(error).__name__}); {SHAPES}"
            ) from error
        if not _checks(tree, checking | set(_checking(tree))):
            raise EstuneError(f"{column} has {test!r:.80}, which checks nothing: every program passes it; {SHAPES}")


def is_decisive(test: str, setup: str = "") -> bool:
    """Whether a program that does nothing is sure to fail an assertion. It is not run: False leaves it open."""
    sealed = seal(test, setup)
    if sealed is None or not free_names([test], setup):
        return False
    # What `stub` gives equals nothing, and has no truth.
    values = {slot: object() for code, slot in sealed.steps if slot is not None and not code.startswith("bool(")}
    return not sealed.holds(values) and not sealed.holds({})


def stub(names: Iterable[str]) -> str:
    """A program with functions of these names, whose result can be called, equals nothing, and has no truth value."""
    return _STUB + "".join(f"def {name}(*values, **named): return Anything()\n" for name in names)


def free_names(tests: Iterable[str], setup: str = "") -> list[str]:
    """Names, sorted, that tests use and that neither the tests, nor the set-up, nor Python define."""
    try:
        top = symtable.symtable("\n".join((setup, *tests)), "tests", "exec")
    except SyntaxError:  # as of `return` outside of a function, which is found here alone: no program passes
        return []
    given = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
    used = {
        name.get_name()
        for table in _tables(top)
        for name in table.get_symbols()
        if name.is_global() and name.is_referenced()
    }
    return sorted(used - given - _BUILT_IN)


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for inner in table.get_children():
        yield from _tables(inner)


def _checking(tree: ast.Module) -> Iterator[str]:
    """Names of functions and classes that check something when they are called."""
    for node in tree.body:
        if isinstance(node, _DEFINITIONS) and any(map(_is_check, ast.walk(node))):
            yield node.name


def _checks(tree: ast.Module, checking: set[str]) -> bool:
    """Whether something is checked when this runs: definitions alone do nothing."""
    nodes = [node for statement in tree.body if not isinstance(statement, _DEFINITIONS) for node in ast.walk(statement)]
    calls = {_called(node) for node in nodes if isinstance(node, ast.Call)}
    return any(map(_is_check, nodes)) or not calls.isdisjoint(checking)


def _is_check(node: ast.AST) -> bool:
    """An `assert`, a `raise`, or a call of what is named like one: `self.assertEqual`, `assert_allclose`, `fail`."""
    match node:
        case ast.Call():
            return _called(node).lower().startswith(("assert", "fail"))
        case ast.Assert(ast.Constant(value)):
            return not value
        case ast.Assert(ast.Tuple([_, *_])):  # `assert (f(1) == 2, "why")` holds whatever `f` gives
            return False
    return isinstance(node, ast.Assert | ast.Raise)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(name) | ast.Attribute(attr=name):
            return str(name)
    return ""

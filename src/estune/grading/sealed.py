"""Tests whose expected value never comes near the program.

`assert f(2) == 4` is taken apart: the call goes into the sandbox, its result comes back as data, and the comparison is
made here, by the interpreter of `expressions.py`, which executes nothing. So whatever a program does in its process, it
passes only by returning the value.

A test is sealed if it is made of plain statements (imports, assignments, definitions without checks) and `assert`s, or
is HumanEval's `check(candidate)` with a body of these; and if in each `assert` every comparison has a side that needs
nothing of the program. Truth alone, `assert f(2)`, a program can always claim.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from estune.grading.expressions import CONSTANTS, FUNCTIONS, OPERATORS, PARTS, TYPES, Broken, Slot, dotted, evaluate

_LONGEST = 50_000
_MOST_PARTS = 300_000  # of syntax trees, where a name is counted as all that it stands for

# What `f(x)` gives is handed to these inside: that tells no more of the expected value than `f(x)` does.
_INSIDE = {*TYPES, "len", "round", "sorted", "sum", "max", "min", "next", "any", "all"}
# What these give is never a literal.
_NO_LITERAL = {"type", "range", "map", "zip", "filter", "reversed", "enumerate", "iter", "object", "bytearray"}
_METHODS = {name for kind in TYPES.values() for name in dir(kind)}


class Unsealed(Exception):
    """The test has another shape."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A test in two parts.

    Attributes:
        steps: what is done in the sandbox, in order: statements (None), and expressions with the number of their value.
        apart: whether the steps have names of their own, on top of the program's.
        checks: conditions on the values, as syntax trees.
    """

    steps: tuple[tuple[str, int | None], ...]
    apart: bool
    checks: tuple[ast.expr, ...]

    def holds(self, values: Mapping[int, Any]) -> bool:
        """Whether all conditions hold, given the values of the slots as `literal` reads them."""
        try:
            return all(evaluate(check, values) for check in self.checks)
        except (Broken, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError):
            return False


def seal(test: str, setup: str = "") -> Sealed | None:
    """Take a test apart; None if it has another shape.

    Args:
        test: Python statements.
        setup: statements that run before the program. What they define is not the program's.
    """
    if len(test) + len(setup) > _LONGEST:
        return None
    try:
        return _Sealing(test, setup).sealed()
    except (Unsealed, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def literal(data: Any) -> Any:
    """A value from the JSON that the sandbox sends. What was no literal there is an object that equals nothing.

    Raises:
        Broken: the sandbox cannot have sent this.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, list):
        return [literal(item) for item in data]
    try:
        ((kind, held),) = data.items()
        return _KINDS[kind](held)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise Broken(f"{error}"[:100]) from None


_KINDS: dict[str, Callable[[Any], Any]] = {
    "int": lambda held: int(held, 16),
    "complex": lambda held: complex(*held),
    "bytes": lambda held: held.encode("latin-1"),
    "tuple": lambda held: tuple(literal(item) for item in held),
    "set": lambda held: {literal(item) for item in held},
    "frozenset": lambda held: frozenset(literal(item) for item in held),
    "dict": lambda held: {literal(key): literal(value) for key, value in held},
    "other": lambda _: object(),
}


def values_of(lines: list[str]) -> dict[int, dict[int, Any]]:
    """The values that a program's process sent, a line each, by test and slot. Other lines are skipped."""
    found: dict[int, dict[int, Any]] = {}
    for line in lines:
        try:
            test, slot, data = json.loads(line)
            found.setdefault(test, {}).setdefault(slot, literal(data))
        except (ValueError, TypeError, RecursionError, MemoryError, Broken):
            continue
    return found


class _Sealing(ast.NodeTransformer):
    """Takes a test apart, and puts slots in its conditions for what is the program's."""

    def __init__(self, test: str, setup: str) -> None:
        self._steps: list[tuple[ast.AST, int | None]] = []
        self._checks: list[ast.expr] = []
        self._program = set[str]()  # names that are the program's though the test binds them, or Python has them
        self._objects = set[str]()  # names to which the test gives what the program made
        self._constants: dict[str, ast.expr] = {}
        self._sizes: dict[str, int] = {}  # parts of each, where each name in it stands for all of its constant
        self._copied = 0  # parts that have come to stand for names so far
        self._expected = set[str]()  # those of them that a comparison is made with
        self._bound = Counter(_bound(ast.parse(setup)))
        self._body = ast.parse(test).body

    def sealed(self) -> Sealed:
        body = self._body
        apart = False
        match body:
            case [*before, ast.FunctionDef(name=check) as function, ast.Expr(ast.Call(ast.Name(called), [entry], []))]:
                given = ast.unparse(function.args)
                if check == called and isinstance(entry, ast.Name) and given.isidentifier():
                    # Its parameter becomes a name.
                    body = [*before, *ast.parse(f"{given} = {entry.id}").body, *function.body]
                    apart = True
                    self._program.add(given)
        for statement in body:
            self._bound.update(_bound(statement))
        for statement in body:
            self._take(statement)
        if not self._checks:
            raise Unsealed
        return Sealed(tuple((ast.unparse(node), slot) for node, slot in self._needed()), apart, tuple(self._checks))

    def _needed(self) -> Iterator[tuple[ast.AST, int | None]]:
        """The steps but those that serve only the expected values."""
        names = [_names(step) for step, _ in self._steps]
        uses = Counter(name for in_step in names for name in in_step)
        given = {_assigned(step): number for number, (step, _) in enumerate(self._steps)}
        dropped = set[int]()
        for name in filter(self._expected.__contains__, reversed(self._constants)):
            if uses[name] > 1:  # not only where it is given its value
                if not isinstance(self._constants[name], ast.Constant):
                    raise Unsealed  # the program may change it
            else:
                dropped.add(given[name])
                uses.subtract(names[given[name]])
        yield from (step for number, step in enumerate(self._steps) if number not in dropped)

    def _take(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assert(test=test):
                self._checks.append(self._condition(test))
            case ast.Expr(ast.Constant()) | ast.Pass():
                pass
            case ast.Import() | ast.ImportFrom() | ast.Assign() | ast.AnnAssign():
                self._note(statement)
                self._steps.append((statement, None))
            case ast.FunctionDef() | ast.ClassDef():
                if any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(statement)):
                    raise Unsealed
                self._steps.append((statement, None))
            case _:
                raise Unsealed

    def _note(self, statement: ast.stmt) -> None:
        """Note for the names of a statement whether they stand for a constant, or for an object of the program's."""
        name = _assigned(statement)
        if name is None or self._bound[name] > 1 or not isinstance(statement, ast.Assign):
            return
        if self._is_programs(statement.value):
            self._objects.add(name)
        elif not any(self._is_programs(part) for part in ast.walk(statement.value)):
            before = self._copied
            size = sum(1 for _ in ast.walk(statement.value))
            with suppress(Unsealed):
                self._constants[name] = self.visit(statement.value)
                self._sizes[name] = size + self._copied - before

    def _condition(self, node: ast.expr) -> ast.expr:
        """With slots for what is the program's; where there is none, a built-in name may have been given to it."""
        found = self._truth(node)
        if any(isinstance(part, ast.Call) for part in ast.walk(found)) and not _has_slot(found):
            names = {dotted(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
            self._program.update(name for name in names if name not in self._bound)
            found = self._truth(node)
        return found

    def _truth(self, node: ast.expr) -> ast.expr:
        """A condition of which only the truth counts, so that the truth comes back instead of the value."""
        match node:
            case ast.BoolOp(operation, parts):
                return ast.BoolOp(operation, [self._truth(part) for part in parts])
            case ast.UnaryOp(ast.Not() as operation, part):
                return ast.UnaryOp(operation, self._truth(part))
            case _ if self._is_programs(node):
                if self._may_compare(node):
                    raise Unsealed
                return self._slot(ast.Call(ast.Name("bool"), [node], []))
        found: ast.expr = self.visit(node)
        return found

    def _may_compare(self, node: ast.AST, given: bool = False) -> bool:
        """Whether a comparison of the program's value with another may hide in a call to what is not known here.

        Args:
            node: looked at with all that is in it.
            given: whether a call is given it.
        """
        if given and self._is_programs(node):
            return True
        if not isinstance(node, ast.Call):
            return any(self._may_compare(part, given) for part in ast.iter_child_nodes(node))
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        known = isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS
        if known and arguments:
            return True
        return self._may_compare(node.func, given) or any(self._may_compare(part, True) for part in arguments)

    def visit(self, node: ast.AST) -> Any:
        """Slots for what is the program's; nothing is let through that `evaluate` does not know."""
        return self._slot(node) if self._is_programs(node) else super().visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, PARTS) and type(node) not in OPERATORS:
            raise Unsealed
        return super().generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        parts = [self.visit(part) for part in (node.left, *node.comparators)]
        ranges = any(isinstance(part, ast.Call) and dotted(part.func) == "range" for part in parts)  # no literals
        if ranges or any(_has_slot(left) and _has_slot(right) for left, right in pairwise(parts)):
            raise Unsealed
        return ast.Compare(parts[0], node.ops, parts[1:])

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        if None in node.keys:
            raise Unsealed
        return super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self._constants:
            self._expected.add(node.id)
            self._copied += self._sizes[node.id]
            if self._copied > _MOST_PARTS:
                raise Unsealed
            return self._constants[node.id]
        return self.visit_Attribute(node)

    def visit_Attribute(self, node: ast.Attribute | ast.Name) -> ast.AST:
        if dotted(node) not in CONSTANTS or self._bound[dotted(node)]:
            raise Unsealed
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = dotted(node.func)
        if name not in FUNCTIONS or self._bound[name] or None in [keyword.arg for keyword in node.keywords]:
            raise Unsealed
        keywords = [ast.keyword(keyword.arg, self.visit(keyword.value)) for keyword in node.keywords]
        return ast.Call(node.func, [self.visit(argument) for argument in node.args], keywords)

    def _is_programs(self, node: ast.AST) -> bool:
        """Whether this is a call of a name that the program defines, or something taken from what one gives."""
        match node:
            case ast.Call(ast.Name(name)):
                if self._bound[name] or name in _NO_LITERAL:
                    return name in self._program
                return name in self._program or self._goes_inside(name, node) or name not in FUNCTIONS
            case ast.Call(ast.Attribute(value)) | ast.Attribute(value) | ast.Subscript(value):
                return self._is_programs(value) or (isinstance(value, ast.Name) and value.id in self._objects)
            case ast.Call(ast.Call() as function):
                return self._is_programs(function)
            case _:
                return False

    def _goes_inside(self, name: str, call: ast.Call) -> bool:
        """Whether this hands a function of Python's what the program gives, and nothing to compare it with."""
        alone = len(call.args) == 1 and not call.keywords
        given = bool(call.args) and self._is_programs(call.args[0])
        return name in _INSIDE and given and (alone or name not in ("max", "min"))

    def _slot(self, node: ast.AST) -> Slot:
        number = len(self._steps)
        self._steps.append((node, number))
        return Slot(number)


def _bound(tree: ast.AST) -> Iterator[str]:
    """Names that are bound anywhere in a syntax tree."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Store() | ast.Del()):
                yield name
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.AsyncFunctionDef(name):
                yield name
            case ast.alias(name, other):
                yield other or name.partition(".")[0]


def _has_slot(node: ast.AST) -> bool:
    return any(isinstance(part, Slot) for part in ast.walk(node))


def _assigned(statement: ast.AST) -> str | None:
    """The name that an assignment to a single name binds, or None."""
    match statement:
        case ast.Assign([ast.Name(name)]):
            return name
    return None


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}

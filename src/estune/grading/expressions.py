"""A small interpreter of Python's expressions: literals, arithmetic, comparisons and a few functions.

It executes nothing, and no operation in it takes long or much memory, so that anyone's expressions can be given to it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

_MOST_DIGITS = 4_000
_MOST_ITEMS = 100_000


class Broken(Exception):
    """There is no such value: one is missing, or the operation does not take its type."""


class Slot(ast.expr):
    """Stands for a value that is given when the expression is evaluated."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _range(*numbers: int) -> range:
    found = range(*numbers)
    if len(found) > _MOST_ITEMS:
        raise Broken("too large")
    return found


def _bytes(source: Any = b"", *how: str) -> bytes:
    if isinstance(source, int) and source > _MOST_ITEMS:
        raise Broken("too large")
    return bytes(source, *how)


def _round(number: Any, ndigits: int | None = None) -> Any:
    if ndigits is not None and abs(ndigits) > _MOST_DIGITS:
        raise Broken("too large")
    return round(number, ndigits)


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.And: all, ast.Or: any,
}  # fmt: skip
PARTS = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.expr_context)
TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
CONSTANTS = {"math.pi": math.pi, "math.e": math.e, "math.inf": math.inf, "math.nan": math.nan, **TYPES}
_NUMBER = (int, float, complex)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **TYPES, "bytes": _bytes, "abs": abs, "len": len, "max": max, "min": min, "round": _round, "sorted": sorted,
    "sum": sum, "isinstance": isinstance, "range": _range, "math.fabs": math.fabs, "math.isclose": math.isclose,
    "math.sqrt": math.sqrt,
}  # fmt: skip


def evaluate(expression: ast.expr, values: Mapping[int, Any]) -> Any:
    """What an expression comes to.

    Args:
        expression: made of `PARTS`, `OPERATORS`, comparisons, names of `CONSTANTS`, calls of `FUNCTIONS`, and slots.
        values: what stands in the slots, by number.

    Raises:
        Broken: it is made of something else, or the values do not go together; likewise other errors of Python's.
    """
    return _Values(values).visit(expression)


def dotted(node: ast.expr) -> str:
    """A name, or an attribute of one, as it is written; empty for anything else."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(ast.Name(module), name):
            return f"{module}.{name}"
    return ""


class _Values(ast.NodeVisitor):
    """Evaluates one expression after another."""

    def __init__(self, values: Mapping[int, Any]) -> None:
        self._given = values

    def generic_visit(self, node: ast.AST) -> Any:
        raise Broken(type(node).__name__)

    def visit_Slot(self, node: Slot) -> Any:
        return self._given[node.number]

    def visit_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def visit_Name(self, node: ast.Name | ast.Attribute) -> Any:
        return CONSTANTS[dotted(node)]

    visit_Attribute = visit_Name

    def visit_BoolOp(self, node: ast.BoolOp) -> bool:
        return bool(OPERATORS[type(node.op)](self.visit(part) for part in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        return OPERATORS[type(node.op)](self.visit(node.operand))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        return _arithmetic(node.op, self.visit(node.left), self.visit(node.right))

    def visit_Compare(self, node: ast.Compare) -> bool:
        numbers = [self.visit(part) for part in (node.left, *node.comparators)]
        compared = zip(node.ops, pairwise(numbers), strict=True)
        return all(OPERATORS[type(operation)](*pair) for operation, pair in compared)

    def visit_List(self, node: ast.List) -> list[Any]:
        return [self.visit(item) for item in node.elts]

    def visit_Tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.visit(item) for item in node.elts)

    def visit_Set(self, node: ast.Set) -> set[Any]:
        return {self.visit(item) for item in node.elts}

    def visit_Dict(self, node: ast.Dict) -> dict[Any, Any]:
        pairs = zip(node.keys, node.values, strict=True)
        return {self.visit(key): self.visit(value) for key, value in pairs if key is not None}

    def visit_Call(self, node: ast.Call) -> Any:
        named = {keyword.arg or "": self.visit(keyword.value) for keyword in node.keywords}
        return FUNCTIONS[dotted(node.func)](*map(self.visit, node.args), **named)


def _arithmetic(operation: ast.operator, left: Any, right: Any) -> Any:
    """Arithmetic of numbers; texts and lists may be added and repeated. Nothing may take long, or much memory."""
    numbers = isinstance(left, _NUMBER) and isinstance(right, _NUMBER)
    if isinstance(operation, ast.Mult) and not numbers:
        items, times = (left, right) if isinstance(right, int) else (right, left)
        if not isinstance(times, int) or len(items) * times > _MOST_ITEMS:
            raise Broken("too large, or no product")
    elif isinstance(operation, ast.Pow):
        if not numbers or (isinstance(right, int) and abs(right) * math.log10(abs(left) + 1) > _MOST_DIGITS):
            raise Broken("too large")
    elif isinstance(operation, ast.Mod) and not numbers:
        raise Broken("a format")
    return OPERATORS[type(operation)](left, right)

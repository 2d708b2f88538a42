"""What a completion may say where a library hands it to Python's `eval`, or to sympy's `parse_expr`, which evaluates.

Both checks let through values and nothing else: no attribute, no index, no string that is read as code, and no call but
of the functions named here. What passes may take long to evaluate, but can do nothing else.
"""

from __future__ import annotations

import ast
import re

FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot"),
        *("sinh", "cosh", "tanh", "coth", "asinh", "acosh", "atanh"),
        *("exp", "log", "ln", "sqrt", "cbrt", "Abs", "erf", "sign", "Rational"),
    )
)
"""Functions of sympy that a formula may call."""

_CHARACTERS = re.compile(r"[A-Za-z0-9+\-*/(),. \n]+")
# Sympy takes minutes over 1e999999.
_HUGE = re.compile(r"[0-9.][eE][+-]?[0-9]{3}|[0-9]{31}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub),
)
# Of what is nested too deeply, or a complex number that no float holds; a null byte is a ValueError in some versions of
# Python.
_UNREADABLE = (SyntaxError, ArithmeticError, ValueError, TypeError, MemoryError, RecursionError)


def is_literal(text: str) -> bool:
    """Whether a text is a Python literal: numbers, strings, and lists, tuples, sets and dictionaries of them."""
    try:
        ast.literal_eval(text.strip())
    except _UNREADABLE:
        return False
    return True


def is_formula(text: str) -> bool:
    """Whether a text is a formula of numbers, names, + - * / ** and brackets, and calls of `FUNCTIONS`.

    Numbers have at most 30 digits, and 2 in an exponent; names are of letters and digits. What stands for itself in
    sympy (`E`, `pi`) does so; others are unknowns.
    """
    if not _CHARACTERS.fullmatch(text) or _HUGE.search(text):
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except _UNREADABLE:
        return False
    return all(map(_harmless, ast.walk(tree)))


def _harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Name):
        return _NAME.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    return isinstance(node, _NODES)

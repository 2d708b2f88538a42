"""Exact arithmetic on untrusted text: + - * / and brackets over the rationals, in bounded work."""

import re
from collections.abc import Sequence
from fractions import Fraction

Value = int | Fraction

MAX_LENGTH = 512
"""Longest expression read, in characters. It bounds everything else: depth, the size of results, the time."""

MAX_DIGITS = 20
"""Most digits in one number."""

_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_TOKEN = re.compile(r"[0-9]+|[+\-*/()]")
_NEGATE = "negate"
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, _NEGATE: 3}


class ExpressionError(ValueError):
    """The text is no expression, or has no value."""


def tokenize(text: str) -> list[str]:
    """Numbers, operators and brackets in order.

    Raises:
        ExpressionError: empty or over-long text, a character outside `0-9 + - * / ( ) space`, or an over-long number.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters, more than {MAX_LENGTH}")
    if not _ALLOWED.fullmatch(text):
        raise ExpressionError("empty, or a character other than 0-9 + - * / ( ) and space")
    tokens = _TOKEN.findall(text)
    if max(map(len, tokens), default=0) > MAX_DIGITS:
        raise ExpressionError(f"a number of more than {MAX_DIGITS} digits")
    return tokens


def evaluate(tokens: Sequence[str]) -> Value:
    """The exact value of an expression with the usual precedence, left to right, and signs in front of operands.

    `**` and `//` are no operators. Two stacks instead of recursion (Dijkstra's shunting yard): brackets cost memory
    in proportion to the text and cannot exhaust the interpreter's stack.

    Raises:
        ExpressionError: malformed, or a division by zero.
    """
    values: list[Value] = []
    operators: list[str] = []
    operand_next = True
    for token in tokens:
        if operand_next:
            if token in ("(", "-"):
                operators.append(_NEGATE if token == "-" else token)
            elif token.isdigit():
                values.append(int(token))
                operand_next = False
            elif token != "+":
                raise ExpressionError(f"{token!r} where a number should be")
        elif token == ")":
            _reduce(values, operators, 0)
            if not operators:
                raise ExpressionError("a bracket is closed that was never opened")
            operators.pop()
        elif token in _PRECEDENCE:
            _reduce(values, operators, _PRECEDENCE[token])
            operators.append(token)
            operand_next = True
        else:
            raise ExpressionError(f"{token!r} where an operator should be")
    if operand_next:
        raise ExpressionError("the end where a number should be")
    _reduce(values, operators, 0)
    if operators:
        raise ExpressionError("a bracket is never closed")
    return values[0]


def _reduce(values: list[Value], operators: list[str], precedence: int) -> None:
    """Apply the operators on the stack, down to a bracket or to one that binds less tightly."""
    while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= precedence:
        operator = operators.pop()
        right = values.pop()
        if operator == _NEGATE:
            values.append(-right)
            continue
        values.append(_apply(operator, values.pop(), right))


def _apply(operator: str, left: Value, right: Value) -> Value:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise ExpressionError("division by zero")
    return Fraction(left) / right

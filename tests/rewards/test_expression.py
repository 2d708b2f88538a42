import ast
import operator
import re
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estune.rewards.expression import MAX_DIGITS, MAX_LENGTH, ExpressionError, evaluate, tokenize
from tests.work import lines_run


def value(text: str) -> Fraction | int:
    return evaluate(tokenize(text))


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def reference(text: str) -> Fraction:
    """Python's own grammar, over fractions; what is no arithmetic is a SyntaxError too."""

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=operation, operand=operand) if type(operation) in OPERATIONS:
                return OPERATIONS[type(operation)](walk(operand))
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATIONS:
                return OPERATIONS[type(operation)](walk(left), walk(right))
        raise SyntaxError(ast.dump(node))

    return walk(ast.parse(text.strip(), mode="eval").body)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("44 + 19 + 35", 98),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("10-4-3", 3),
        ("16/4/2", 2),
        ("16/(4/2)", 8),
        ("(1 + 2) / 3", 1),
        ("1/3", Fraction(1, 3)),
        ("8/(3-8/3)", 24),
        ("-3+5", 2),
        ("2*-3", -6),
        ("2--3", 5),
        ("-(2+3)", -5),
        ("+4", 4),
        (" ( ( 7 ) ) ", 7),
    ],
)
def test_known_values(text: str, expected: int | Fraction) -> None:
    assert value(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "()", "1+", "*1", "1 2", "(1", "1)", ")(", "1(2)", "(1)(2)", "2**3", "7//2", "1/0", "1/(2-2)", "1.5",
     "1e3", "x", "1=1", "\uff11", "1\n", "--", "1" * (MAX_DIGITS + 1), "1+" * MAX_LENGTH + "1"],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        value(text)


numbers = st.integers(0, 999).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " - "]), inner).map("".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(expressions)
def test_agrees_with_the_grammar_of_python(text: str) -> None:
    try:
        expected = reference(text)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            value(text)
        return
    if len(text) <= MAX_LENGTH:
        assert value(text) == expected


@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_accepts_and_refuses_what_python_does(text: str) -> None:
    try:
        found = value(text)
    except ExpressionError:
        found = None
    try:
        expected = reference(text)
    except (SyntaxError, ZeroDivisionError):
        expected = None
    # The only differences: Python refuses 007, which we read as 7, and has no limit of digits.
    if not re.search(r"\b0[0-9]|[0-9]{21}", text):
        assert found == expected


@pytest.mark.parametrize(
    "text",
    ["(" * 10**6, ")" * 10**6, "(" * 200 + "1" + ")" * 200, "-" * 10**6 + "1", "-" * 500 + "1", "9*" * 255 + "9",
     "9" * 10**6, "1/7-" * 127 + "1", "\x00" * 10**6],
)  # fmt: skip
def test_work_is_bounded_on_hostile_text(text: str) -> None:
    def attempt() -> None:
        with suppress(ExpressionError):
            value(text)

    assert lines_run(attempt) < 20_000

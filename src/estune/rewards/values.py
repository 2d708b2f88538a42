r"""Values of two answers, compared by `math-verify`, and by their digits where its six decimals are too few.

Its own search for an answer in a text is not used: it also finds numbers in what it cannot read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

from estune.errors import EstuneError

_CLOSE = 1e-4  # how far from each other, relative to the larger, values may be that math-verify finds equal
_SAME = 1e-12  # how near to each other they must be where it does not
_EQUALS = re.compile(r"(?<![<>!\\])=")


def verified(gold: str, answer: str) -> bool:
    """Whether `math-verify` proves two answers, the gold answer first, equal, and their digits agree.

    Raises:
        EstuneError: it is not installed.
    """
    right = _parsed(gold)
    given = _parsed(answer)
    if not right or not given or not _holds(right[0], given[0]):
        return False
    equal = _verify(right, given)
    if not equal and not any(getattr(parsed[0], "is_Float", False) for parsed in (right, given)):
        return False
    difference = _difference(right[0], given[0])
    return equal if difference is None else difference < (_CLOSE if equal else _SAME)


def _verify(gold: Any, answer: Any) -> bool:
    # Its timeouts are signals, which only a main thread can have: the deadline is the grader's.
    return bool(library().verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


def _holds(gold: Any, answer: Any) -> bool:
    """Whether an answer has no wrong equation, nor another than the gold answer has: 8 = 7, x = x + 1, -x = 7.

    The library takes the right side of the last equals sign. The left side is a name for what was asked, such as f(3)
    or m + n.
    """
    from sympy import Basic, Eq

    for equation in answer.atoms(Eq) if isinstance(answer, Basic) else ():
        if _unknowns(equation.lhs):
            if not isinstance(gold, Eq) and not _is_named(equation):
                return False
        elif not _unknowns(equation.rhs) and not _verify(equation.lhs, equation.rhs):
            return False
    return True


def _is_named(equation: Any) -> bool:
    if equation.lhs.is_Symbol:
        return equation.lhs not in equation.rhs.free_symbols
    if not equation.lhs.is_Mul:
        return True
    factor, unknown = equation.lhs.as_coeff_Mul()
    return bool(factor == 1 or not unknown.is_Symbol)


def _unknowns(value: Any) -> Any:
    from sympy.core.function import AppliedUndef

    return value.free_symbols or value.atoms(AppliedUndef)


def _difference(gold: Any, answer: Any) -> float | None:
    """The largest difference of numbers, also in points, sets, intervals or matrices, relative to the larger number.

    None if there are no numbers, or not as many in one answer as in the other.
    """
    ours = list(_numbers(gold))
    theirs = list(_numbers(answer))
    if not ours or len(ours) != len(theirs):
        return None
    one_percent = _is_percent(ours[0]) != _is_percent(theirs[0])
    ours = [number.doit().evalf(20) for number in ours]
    theirs = [number.doit().evalf(20) for number in theirs]
    if len(ours) > 1:
        if not all(number.is_extended_real for number in (*ours, *theirs)):
            return None
        ours.sort()
        theirs.sort()
    differences = [_apart(*pair) for pair in zip(ours, theirs, strict=True)]
    if one_percent and len(ours) == 1:  # 50% is 0.5 and 50
        differences = [min(differences[0], _apart(100 * ours[0], theirs[0]), _apart(ours[0], 100 * theirs[0]))]
    return max(differences)


def _numbers(value: Any) -> Iterator[Any]:
    from sympy import Eq, FiniteSet, Interval, MatrixBase, Symbol, Tuple, Union

    if isinstance(value, MatrixBase):
        parts = value.flat()
    elif isinstance(value, Interval):
        parts = [value.start, value.end]
    elif isinstance(value, FiniteSet | Tuple | Union):
        parts = value.args
    elif isinstance(value, Eq) and isinstance(value.lhs, Symbol):
        parts = [value.rhs]
    else:
        if getattr(value, "is_number", False):
            yield value
        return
    for part in parts:
        yield from _numbers(part)


def _is_percent(value: Any) -> bool:
    from sympy import UnevaluatedExpr

    return bool(value.has(UnevaluatedExpr))


def _apart(one: Any, other: Any) -> float:
    larger = max(abs(one), abs(other))
    return float(abs(one - other) / larger) if larger.is_finite and larger > 0 else 0.0


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    """A text as the library reads it, and as it normalizes it; the latter alone if it cannot read it."""
    from sympy import Eq, I, Symbol

    normalized = library().normalized(text)
    value = library().read(normalized)
    if value is None:
        # `P(X = 3) = 7`: a name that it cannot read.
        *names, last = _EQUALS.split(normalized)
        value = library().read(last) if any(map(str.isalpha, "".join(names))) and "," not in text else None
    if value is None:
        return [normalized]
    if isinstance(value, Eq) and isinstance(value.rhs, Symbol) and not _unknowns(value.lhs):
        value = Eq(value.rhs, value.lhs, evaluate=False)
    if imaginary := {symbol: I for symbol in getattr(value, "free_symbols", ()) if symbol.name == "i"}:
        value = value.xreplace(imaginary)
    return [value, normalized]


class Library(NamedTuple):
    """The parts of `math-verify`, and of the parser that it comes with, that are used."""

    verify: Callable[..., bool]
    normalized: Callable[[str], str]
    read: Callable[[str], Any]
    """What a text is to sympy, None if it is nothing."""


@cache
def library() -> Library:
    """The library, loaded when first asked for.

    Raises:
        EstuneError: it is not installed.
    """
    try:
        from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
        from latex2sympy2_extended.latex2sympy2 import ConversionConfig
        from math_verify import verify
        from math_verify.grader import should_treat_as_complex
    except ImportError as error:
        raise EstuneError("math needs the package math-verify: pip install 'estune[math]'") from error
    # It warns that no timeout is set, which is so on purpose.
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    # Its units are all that follows a number, to the end, and unknowns as t and c.
    as_it_is = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    with_case = ConversionConfig(lowercase_symbols=False)

    def read(text: str) -> Any:
        try:
            return latex2sympy(
                text,
                is_real=not should_treat_as_complex(text),
                normalization_config=None,
                conversion_config=with_case,
            )
        except Exception:  # of many kinds, from what is no mathematics
            return None

    return Library(verify, lambda text: normalize_latex(text, as_it_is), read)

r"""Answers in the notation that `math-verify` reads: what people, models and data sets write otherwise, rewritten.

It reads LaTeX well. Rewritten is what it misreads: characters beyond ASCII, currency, units in words, numbers in words
or with an exponent after an `e`, mixed numbers, texts about a whole answer, and alternatives of inequalities.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox)\s*"
_WHOLE_TEXT = re.compile(_TEXT + r"\{([^{}]*)\}")
_ANNOUNCED = re.compile(_TEXT + r"\{\s*(?:the )?(?:final )?answer(?: is)?\s*:?\s*\}\s*", re.IGNORECASE)
_CURRENCY = re.compile(r"\\?\$|[€£¥₹]|\\(?:pounds|euro)\b")
_LINE_BREAK = re.compile(r"\\n(?![A-Za-z])")
_TRAILING = re.compile(r"(?<!\\)[\s.,;:?]+$")
_NO_BACKSLASH = re.compile(r"(?<![\\A-Za-z])(frac(?=\s*\{)|sqrt(?=\s*\{)|pi|infty)(?![A-Za-z])")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋]+")
_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "\N{UNION}": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"^\circ ",
    "\N{FRACTION SLASH}": "/",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "π": r"\pi ",
    "θ": r"\theta ",
    "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "β": r"\beta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "\N{GREEK SMALL LETTER SIGMA}": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
}
_SIGN = re.compile("[" + "".join(_SIGNS) + "]")
_NOTHING = re.compile(r"\\varnothing\b|\\\{\s*\\\}")

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_EXPONENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)0*(\d{1,3})")
_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
_GROUPED = re.compile(
    r"((?:[A-Za-z]\w*\s*=\s*)?[-+]?)(\d{1,3}(?:(?:[ ']\s?|,|\{,\}\s?|\\,\s?|,\\!\s?)\d{3})+)((?:\.\d+)?)"
)
_GROUP_SIGN = re.compile(r"\D+")
_WITH_UNIT = re.compile(
    rf"({_NUMBER}|[-+]?\d+\s+\d+/\d+|[-+]?\d+/\d+|[-+]?\\[dt]?frac\{{\d+\}}\{{\d+\}})[\s~]*"
    r"([A-Za-z]+(?:[ /-]+[A-Za-z]+)*)"
)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PARTS = (
    *("third", "quarter", "fourth", "fifth", "sixth", "seventh"),
    *("eighth", "ninth", "tenth", "hundredth", "thousandth"),
)
_NO_UNITS = {
    *("and", "or", "to", "choose", "mod", "percent", "percentage", "if", "when", "factorial", "squared", "cubed"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "infinity"),
    *("times", "plus", "minus", "over", "point", "less", "more", "dozen", "half", "halves"),
    *_PARTS,
    *(f"{part}s" for part in _PARTS),
}
_SHORT_UNITS = {
    *("cm", "mm", "km", "kg", "mg", "ml", "ft", "lb", "lbs", "oz", "hr", "hrs", "min", "mph", "usd", "eur", "gbp"),
}
_UNIT_LETTERS = 4  # with fewer it could be a product of unknowns: 6abc
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_IN_WORDS = {
    **{word: str(number) for number, word in enumerate(_ONES)},
    **{word: str(10 * number) for number, word in enumerate(_TENS, 2)},
    **{f"{ten}-{_ONES[one]}": str(10 * number + one) for number, ten in enumerate(_TENS, 2) for one in range(1, 10)},
}

_OR = re.compile(rf"\s*(?:{_TEXT}\{{\s*or\s*\}}|\bor\b|\\lor\b|\\vee\b)\s*")
_INEQUALITY = re.compile(r"[A-Za-z]\s*(<|>|\\l(?:eq?|eqslant|t)\b|\\g(?:eq?|eqslant|t)\b)\s*([^<>=,]+)")
_MOST_ALTERNATIVES = 6


@lru_cache(maxsize=4096)
def rewritten(text: str) -> str:
    """An answer in the notation that `math-verify` reads. Its length is to be bounded by the caller."""
    text = _ascii(text)
    text = _LINE_BREAK.sub(" ", text).strip()
    text = _ANNOUNCED.sub("", unwrapped(text))
    text = _TRAILING.sub("", _CURRENCY.sub("", text)).strip()
    text = _NOTHING.sub(r"\\emptyset", _NO_BACKSLASH.sub(r"\\\1 ", text))
    text = _alternatives(text)
    return _number(_IN_WORDS.get(text.lower(), text))


def unwrapped(text: str) -> str:
    r"""What a `\text{}` holds that is the whole; anything else as it is."""
    whole = _WHOLE_TEXT.fullmatch(text)
    return whole[1].strip() if whole else text


def _ascii(text: str) -> str:
    if text.isascii():
        return text
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = "".join(_plain_character(character) for character in text)
    text = _SIGN.sub(lambda sign: _SIGNS[sign[0]], text)
    return _ROOT.sub(lambda root: f"\\sqrt{{{root[1].strip('(){}')}}}", text)


def _plain_character(character: str) -> str:
    """Digits of other scripts and widths as ours; ½ as 1/2, after a space, for it may follow a number."""
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.digit(character))
    if kind == "No" and "VULGAR FRACTION" in unicodedata.name(character, ""):
        return f" {unicodedata.normalize('NFKC', character)}"
    return " " if kind == "Zs" else character


def _number(text: str) -> str:
    """A number as digits, where it is one that has a unit, an exponent, a fraction beside it or groups of digits."""
    measured = _WITH_UNIT.fullmatch(text)
    power = 0
    if measured:
        words = re.split(r"[ /-]+", measured[2].lower())
        power = _MAGNITUDES.get(words[0], 0)
        if power or _is_unit(words):
            text = measured[1]
    if found := _GROUPED.fullmatch(text):
        text = f"{found[1]}{_GROUP_SIGN.sub('', found[2])}{found[3]}"
    if found := _MIXED.fullmatch(text):
        text = rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}"
    if found := _EXPONENT.fullmatch(text):
        text = rf"{found[1]} \times 10^{{{found[2].strip('+')}{found[3]}}}"
    return rf"{text} \times 10^{{{power}}}" if power else text


def _is_unit(words: list[str]) -> bool:
    if not _NO_UNITS.isdisjoint(words):
        return False
    return words[0] in _SHORT_UNITS or sum(map(len, words)) >= _UNIT_LETTERS


def _alternatives(text: str) -> str:
    """`x < 1 or x > 2` as a union of intervals."""
    parts = _OR.split(text)
    found = [_INEQUALITY.fullmatch(part.strip()) for part in parts]
    if not 2 <= len(parts) <= _MOST_ALTERNATIVES or None in found:
        return text
    return r"\cup".join(_interval(*part.groups()) for part in found if part)


def _interval(relation: str, bound: str) -> str:
    closed = relation.startswith("\\") and not relation.endswith("t")
    if relation == "<" or relation.startswith("\\l"):
        return rf"(-\infty,{bound.strip()}{']' if closed else ')'}"
    return rf"{'[' if closed else '('}{bound.strip()},\infty)"

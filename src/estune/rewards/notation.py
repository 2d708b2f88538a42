r"""Answers of people, models and data sets, rewritten in the notation that `math-verify` reads.

It reads LaTeX well. What it misreads is rewritten: characters beyond ASCII, currency, texts around a whole answer,
alternatives of inequalities, proportions, primes, and numbers as `quantities.py` reads them.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from estune.rewards.quantities import TEXT_COMMAND, as_number, without_units

_WHOLE_TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*)\}")
_ANNOUNCED = re.compile(TEXT_COMMAND + r"\{\s*(?:the )?(?:final )?answer(?: is)?\s*:?\s*\}\s*", re.IGNORECASE)
_LEADING = re.compile(r"(?:=|\\(?:approx|simeq)(?![A-Za-z]))\s*")
_CURRENCY = re.compile(r"\\?\$|[€£¥₹]|\\(?:pounds|euro)\b")
_LINE_BREAK = re.compile(r"\\n(?![A-Za-z])")
_SPACES = re.compile(r"[\s~]{2,}")  # which patterns with optional spaces would try in every division
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

_PHRASES = {
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions"), r"\emptyset"),
    **dict.fromkeys(("all real numbers", "all reals"), r"\mathbb{R}"),
    "infinity": r"\infty",
    "does not exist": "DNE",
}
# Of derivatives; of a number they are feet. The library drops them.
_PRIMES = re.compile(r"(?<=[A-Za-z)])'+(?![A-Za-z])")
_BRACKETS_WITH_BASE = re.compile(r"^\(([0-9A-Z]+)\)_(?=\{?\d+\}?$)")
_BASE_IN_WORDS = re.compile(rf"(?<=[0-9A-F])_\{{?(?:{TEXT_COMMAND}\{{)?\s*([a-z]+)\s*\}}*$")
_ORDINAL = re.compile(rf"(?<=\d)(?:\^\s*\{{?\s*(?:{TEXT_COMMAND}\{{)?\s*(?:st|nd|rd|th)\s*\}}*|th)$")
_RATIO_IN_WORDS = re.compile(rf"(?<=\d)\s*(?:{TEXT_COMMAND}\{{\s*to\s*\}}|\bto\b)\s*(?=\d)")
_PROPORTION = re.compile(r"[^:,()\[\]=<>]+(?::[^:,()\[\]=<>]+){2,}")

_OR = re.compile(rf"\s*(?:{TEXT_COMMAND}\{{\s*or\s*\}}|\bor\b|\\lor\b|\\vee\b)\s*")
_INEQUALITY = re.compile(r"[A-Za-z]\s*(<|>|\\l(?:eq?|eqslant|t)\b|\\g(?:eq?|eqslant|t)\b)\s*([^<>=,]+)")
_MOST_ALTERNATIVES = 6


@lru_cache(maxsize=4096)
def rewritten(text: str) -> str:
    """An answer in the notation that `math-verify` reads. Its length is to be bounded by the caller."""
    text = _ascii(text)
    text = _SPACES.sub(" ", _LINE_BREAK.sub(" ", text)).strip()
    text = _ANNOUNCED.sub("", unwrapped(text))
    text = _TRAILING.sub("", _CURRENCY.sub("", text)).strip()
    text = _NOTHING.sub(r"\\emptyset", _NO_BACKSLASH.sub(r"\\\1 ", text))
    if leading := _LEADING.match(text):
        text = text[leading.end() :]
    text = _PHRASES.get(text.lower(), text)
    text = _PRIMES.sub(_primes, text)
    text = _BASE_IN_WORDS.sub(lambda base: f"_{{{as_number(base[1])}}}", _ORDINAL.sub("", text))
    text = _BRACKETS_WITH_BASE.sub(r"\1_", _RATIO_IN_WORDS.sub(":", text))
    return as_number(_proportion(_alternatives(without_units(text))))


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


def _primes(found: re.Match[str]) -> str:
    return "^{" + r"\prime " * len(found[0]) + "}"


def _proportion(text: str) -> str:
    """`a:b:c` as the point (1, b/a, c/a): the library divides from left to right."""
    if not _PROPORTION.fullmatch(text):
        return text
    first, *others = text.split(":")
    parts = [rf"\frac{{{other}}}{{{first}}}" for other in others]
    return f"(1,{','.join(parts)})"


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

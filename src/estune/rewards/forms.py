r"""Answers that differ in form, though `math-verify` reads the same value from them.

Words are no products of their letters, a time is no fraction, a list is no point, `x = 1, y = 2` is no list, and a
number in another base than ten is not the decimal number with the same digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from math import gcd

_LETTERS = re.compile(r"[A-Za-z][A-Za-z ,-]+")
_WORD = re.compile(r"[a-z]{3,}")
_VOWELS = frozenset("aeiouy")

_SPACE = r"(?:[\s~}]|\\[,;:! ])*"
_COMMAND = r"(?:\\(?:text|math|bold)\w*\s*\{)?\s*"
_CHOICE = re.compile(r"\(?([A-J])\)?|\(([a-j])\)")
_CHOSEN = re.compile(
    rf"{_COMMAND}(?:(?:[Oo]ption|[Cc]hoice)\s+)?(?:\(([A-Ja-j])\)|([A-Ja-j])(?:[).:]|\s*\}}|$))(.*)", re.DOTALL
)
_OTHER_CHOICE = re.compile(r"[\s.)}]*(?:[,;/&]|and\b|or\b)\s*(?:\([A-Ja-j]\)|[A-J]\b)")
# (B) 5, but no product (B)(5), and no (B) \cup (C).
_LABELLED = re.compile(
    rf"(?:\\(?:text|math|bold)\w*\s*\{{\s*(?:\(([A-J])\)|([A-J])[).:])|\(([A-J])\)(?=\s|~|\\ )|([A-J])[).:](?=\s))"
    rf"{_SPACE}(?!and\b|or\b)([\w.$-].*|\\(?![cd]up|cap|cdot|times|to\b|in\b|le|ge|sub|sup|div|circ|right).*)",
    re.DOTALL,
)

_NOT_IN_CLOCK = re.compile(r"\\(?:text|mathrm|mbox)|[{}\s.~\\,$]")
_CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?([ap]m)?")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")
_DECIMAL = re.compile(r"[-+]?\d*\.\d+")

_INTEGER = re.compile(r"[-+]?\d+", re.ASCII)
_BASE = re.compile(r"[0-9A-Z]+_\{?\d+\}?")
_SIZED = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_POINT = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)
_LIST = re.compile(r"[^()\[\]{}=]*,[^()\[\]{}=]*")
_FLAT = re.compile(r"[^()\[\]{}]*")
_SEPARATOR = re.compile(r"[,;]|\b(?:and|or)\b|\\(?:lor|vee)\b")
_SET = re.compile(r"\\\{[^()\[\]]*\\\}")
_ONE_POINT = re.compile(r"\(([^()\[\]]*,[^()\[\]]*)\)")
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*and\s*\}|\band\b)\s*")
_COMMA = re.compile(r"[,;](?![^(\[{]*[)\]}])")
_NAMED = re.compile(r"\s*([A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?\s*=([^=<>]+)")
_NAMED_POINT = re.compile(r"\(([A-Za-z\s,]+)\)\s*=\s*\((.*)\)", re.DOTALL)


def choice(gold: str) -> str | None:
    """The letter that a gold answer consists of, as for a question with choices; None if it is something else."""
    found = _CHOICE.fullmatch(gold)
    return (found[1] or found[2]).upper() if found else None


def is_choice(letter: str, answer: str) -> bool:
    """Whether an answer chooses this letter and no other."""
    chosen = _CHOSEN.fullmatch(answer.strip())
    if chosen is None or _OTHER_CHOICE.match(chosen[3]):  # "(B) or (C)" chooses nothing
        return False
    return bool((chosen[1] or chosen[2]).upper() == letter)


def labelled(text: str) -> tuple[str, str] | None:
    r"""A choice's letter and what it stands for: `\textbf{(B)}\ 5` is B and 5."""
    found = _LABELLED.fullmatch(text.strip())
    return (next(filter(None, found.groups())), found[5]) if found else None


def by_clock(gold: str, answer: str) -> bool | None:
    """Whether an answer is the same time of day as the gold answer; None where the gold answer is none.

    Times are equal hour by hour and minute by minute, and before or after noon where both say so. `9:16`, in lowest
    terms, may be a ratio as well; `10:30` is only a time, and equals no number.
    """
    right = _CLOCK.fullmatch(_NOT_IN_CLOCK.sub("", gold.lower()))
    if not right:
        return None
    given = _CLOCK.fullmatch(_NOT_IN_CLOCK.sub("", answer.lower()))
    if given:
        halves = {right[4], given[4]} - {None}
        return _time(right) == _time(given) and len(halves) < 2
    minutes = int(right[2])
    is_ratio = not right[3] and not right[4] and minutes and gcd(int(right[1]), minutes) == 1
    return None if is_ratio else False


def _time(found: re.Match[str]) -> list[int]:
    return [int(number or 0) for number in found.group(1, 2, 3)]


def differ(gold: str, answer: str, is_text: bool) -> bool:
    r"""Whether two answers in the library's notation, different as texts, differ in a way that it does not see.

    These are

    - words, whose letters it takes for factors in any order, and whole numbers;
    - numbers in different bases; a number without a base is in base ten;
    - a ratio, and a decimal that does not equal it exactly;
    - a point or an interval, and a list or a set; lists of different lengths.
    """
    whole = _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer) and int(gold) != int(answer)
    based = (_BASE.fullmatch(gold) or _BASE.fullmatch(answer)) and _base(gold) != _base(answer)
    return bool(whole or based or _words(gold, is_text) or _not_exactly(gold, answer) or _other_kind(gold, answer))


def _words(gold: str, is_text: bool) -> bool:
    """Whether a text consists of words: `is_text` says so, or a word has a vowel and, unlike abc, unordered letters."""
    if not _LETTERS.fullmatch(gold):
        return False
    words = _WORD.findall(gold.lower())
    return is_text or any(not _VOWELS.isdisjoint(word) and list(word) != sorted(word) for word in words)


def _base(number: str) -> str:
    return number.partition("_")[2].strip("{} ") or "10"


def _not_exactly(gold: str, answer: str) -> bool:
    for one, other in ((gold, answer), (answer, gold)):
        if ":" in one and _DECIMAL.fullmatch(other):
            ratio = _RATIO.fullmatch(one)
            return not ratio or Fraction(ratio[1]) != Fraction(other) * Fraction(ratio[2])
    return False


def _other_kind(gold: str, answer: str) -> bool:
    one = _SIZED.sub("", gold)
    other = _SIZED.sub("", answer)
    if _POINT.fullmatch(one):
        return bool(_LIST.fullmatch(other) or _SET.fullmatch(other))
    if _POINT.fullmatch(other):
        return _SET.fullmatch(one) is not None
    if not (_FLAT.fullmatch(one) and _FLAT.fullmatch(other)) or r"\pm" in one + other:
        return False
    return _length(one) != _length(other)


def _length(text: str) -> int:
    return sum(not part.isspace() and part != "" for part in _SEPARATOR.split(text))


def in_one_order(gold: str, answer: str) -> tuple[str, str]:
    """Both as points where one names its values, `x = 1, y = 2`, or where only one has brackets; else as they are.

    Values without names are in the order of those with. Only x, y and z that the answer names have one of their own.
    """
    if "," not in gold + answer and "and" not in gold + answer:
        return gold, answer
    right = _named(gold)
    given = _named(answer)
    if right and given:
        if right.keys() == given.keys():
            return _point(right.values()), _point(given[name] for name in right)
    elif right:
        return _point(right.values()), _as_point(answer)
    elif given:
        names = sorted(given) if given.keys() <= set("xyz") else list(given)
        return _as_point(gold), _point(given[name] for name in names)
    elif _ONE_POINT.fullmatch(_SIZED.sub("", answer)):
        return _as_point(gold), answer
    return gold, answer


def _named(text: str) -> dict[str, str] | None:
    """Values by name, if there are several and each has a name of its own: x_1 and x_2 are values of one x."""
    text = _SIZED.sub("", text)
    if point := _NAMED_POINT.fullmatch(text):
        names = [name.strip() for name in point[1].split(",")]
        values = _COMMA.split(point[2])
    else:
        parts = [_NAMED.fullmatch(part) for part in _COMMA.split(_AND.sub(",", text))]
        names = [part[1] for part in parts if part]
        values = [part[2].strip() for part in parts if part]
        if len(names) < len(parts):
            return None
    named = dict(zip(names, values, strict=False))
    return named if len(named) == len(names) == len(values) > 1 else None


def _point(values: Iterable[str]) -> str:
    return f"({','.join(values)})"


def _as_point(text: str) -> str:
    return f"({_AND.sub(',', text)})" if _LIST.fullmatch(_AND.sub(",", text)) else text

r"""Numbers as digits, read from words, units, scale words, exponents, fractions or groups of digits."""

from __future__ import annotations

import re

TEXT_COMMAND = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox)\s*"
"""Pattern of the commands whose argument is words."""

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_EXPONENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)0*(\d{1,3})")
_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
_GROUPED = re.compile(
    r"((?:[A-Za-z]\w*\s*=\s*)?[-+]?)(\d{1,3}(?:(?:[ ']\s?|,|\{,\}\s?|\\,\s?|,\\!\s?)\d{3})+)((?:\.\d+)?)"
)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)(?:\{(\d+)\}|(\d))")
_GROUP_SIGN = re.compile(r"\D+")
_BREAK = re.compile(r"[ /-]+")
_SPACE = r"(?:[\s~]|\\[,;:! ])*"
_WITH_UNIT = re.compile(
    rf"(?:({_NUMBER}|[-+]?\d+\s+\d+/\d+|[-+]?\d+/\d+|[-+]?\\[dt]?frac\{{\d+\}}\{{\d+\}}){_SPACE}"
    rf"|(.*(?:\}}|\\pi))(?=[\s~\\]){_SPACE})"
    r"([A-Za-z]+(?:[ /-]+[A-Za-z]+)*)"
)
_UNIT_IN_TEXT = re.compile(
    rf"(?<=[A-Za-z0-9}})\]!.%]){_SPACE}(?:/|\\cdot\b)?{_SPACE}{TEXT_COMMAND}"
    rf"\{{{_SPACE}((?:[^{{}}\\]|\\[,;:! ]|\{{-?\d\}})*)\}}"
    rf"(?:\s*\^\s*(?:\{{\s*-?\d\s*\}}|\d))?(?={_SPACE}(?:$|[,;)\]}}$]|(?:/|\\cdot)?\s*\\(?:text|math|mbox)|and\b|or\b))"
)
_WORD = re.compile(r"[A-Za-z]+")
_SCALES = {
    "dozen": "12",
    **{word: rf"10^{{{power}}}" for word, power in {"hundred": 2, "thousand": 3, "million": 6}.items()},
    **{word: rf"10^{{{power}}}" for word, power in {"billion": 9, "trillion": 12}.items()},
}
_PARTS = (
    *("third", "quarter", "fourth", "fifth", "sixth", "seventh"),
    *("eighth", "ninth", "tenth", "hundredth", "thousandth", "millionth", "billionth"),
)
_NO_UNITS = {
    *("and", "or", "to", "choose", "mod", "base", "if", "when", "where", "for", "else", "otherwise", "not", "no", "is"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "infinity", "binary", "hex", "octal"),
    *("times", "plus", "minus", "over", "point", "less", "more", "fewer", "greater", "up", "half", "halves"),
    *("factorial", "squared", "cubed", "am", "pm"),
    *_PARTS,
    *(f"{part}s" for part in _PARTS),
}
_TIMES = r" \times "
_PERCENT = {"percent", "percentage", "pct"}
_SHORT_UNITS = {
    *("cm", "mm", "km", "kg", "mg", "ml", "ft", "lb", "lbs", "oz", "hr", "hrs", "min", "mph", "usd", "eur", "gbp"),
    *("in", "yd", "mi", "rad", "deg", "sec", "hz", "khz", "mhz", "ghz", "kj", "kw", "mol", "kpa", "ev"),
}
_LONG_UNITS = {
    *("unit", "units", "square", "sq", "cubic", "degree", "degrees", "radian", "radians", "dollars", "cents"),
    *("meters", "metres", "centimeters", "inches", "feet", "miles", "seconds", "minutes", "hours", "days", "years"),
}
_CONSTANTS = ({"e"}, {"i"}, {"j"}, {"d"})
_UNIT_LETTERS = 4  # with fewer it could be a product of unknowns: 6abc

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_BELOW_100 = {
    **{word: number for number, word in enumerate(_ONES)},
    **{word: 10 * number for number, word in enumerate(_TENS, 2)},
    **{f"{ten} {_ONES[one]}": 10 * number + one for number, ten in enumerate(_TENS, 2) for one in range(1, 10)},
}
_SMALL = "|".join(sorted(_BELOW_100, key=len, reverse=True))
_BELOW_1000 = rf"(?:(?:(?:{_SMALL}) hundred)(?: (?:and )?(?:{_SMALL}))?|(?:{_SMALL}))"
_THOUSANDS = ("trillion", "billion", "million", "thousand")
_IN_WORDS = re.compile(
    r"(?P<minus>(?:minus|negative) )?"
    + "".join(rf"(?:(?P<{name}>{_BELOW_1000}) {name}(?: |$))?" for name in _THOUSANDS)
    + rf"(?:and )?(?P<one>{_BELOW_1000})?"
)


def without_units(text: str) -> str:
    r"""A text without the units in `\text{}` behind its numbers; scale words there as factors, percentages as `\%`."""
    if "{" not in text:
        return text
    return _UNIT_IN_TEXT.sub(_factor, text)


def _factor(found: re.Match[str]) -> str:
    words = _WORD.findall(found[1].lower())
    return _meaning(words) if words and _NO_UNITS.isdisjoint(words) and set(words) not in _CONSTANTS else found[0]


def _meaning(words: list[str]) -> str:
    """The factor that words behind a number multiply it by."""
    if words[0] in _PERCENT:
        return r"\%"
    scales = [_SCALES[word] for word in words if word in _SCALES]
    return "".join(f"{_TIMES}{scale}" for scale in scales)


def as_number(text: str) -> str:
    """A number in any of these forms as digits; anything else as it is."""
    text = _from_words(text)
    text, times, rest = text.partition(_TIMES)
    factor = times + rest
    if measured := _WITH_UNIT.fullmatch(text):
        words = _BREAK.split(measured[3].lower())
        if _NO_UNITS.isdisjoint(words) and (_is_unit(words) if measured[1] else _is_known(words)):
            text = measured[1] or measured[2]
            factor = _meaning(words) + factor
    if found := _GROUPED.fullmatch(text):
        text = f"{found[1]}{_GROUP_SIGN.sub('', found[2])}{found[3]}"
    if found := _REPEATING.fullmatch(text):
        text = _repeating(found)
    if found := _MIXED.fullmatch(text):
        text = rf"{found[1]}\frac{{{found[2]}}}{{{found[3]}}}"
    if found := _EXPONENT.fullmatch(text):
        text = rf"{found[1]}{_TIMES}10^{{{found[2].strip('+')}{found[3]}}}"
    return text + factor


def _repeating(found: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as 15/90: less what does not repeat, over a nine for each digit that does."""
    before = found[2] + found[3]
    period = found[4] or found[5]
    numerator = int(before + period) - int(before or "0")
    return rf"{found[1]}\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(found[3])}}}"


def _is_unit(words: list[str]) -> bool:
    return _is_known(words) or sum(map(len, words)) >= _UNIT_LETTERS


def _is_known(words: list[str]) -> bool:
    return words[0] in _SHORT_UNITS or words[0] in _LONG_UNITS or words[0] in _SCALES


def _from_words(text: str) -> str:
    """`minus two hundred and five` as -205."""
    if not text[:1].isalpha():
        return text
    found = _IN_WORDS.fullmatch(" ".join(text.lower().replace("-", " ").split()))
    if not found or not any(map(found.group, (*_THOUSANDS, "one"))):
        return text
    value = 0
    for name in (*_THOUSANDS, "one"):
        value = 1000 * value + _below_1000(found[name] or "")
    return f"{'-' if found['minus'] else ''}{value}"


def _below_1000(words: str) -> int:
    before, _, after = words.rpartition(" hundred")
    return 100 * _BELOW_100.get(before, 0) + _BELOW_100.get(after.removeprefix(" and").strip(), 0)

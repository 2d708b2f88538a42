r"""Where the final answer of a text stands: in a `\boxed{}`, in `<answer>` tags, or after words such as `answer is`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from estune.rewards.text import last_answer

MAX_LENGTH = 1000
"""Longest answer read, in characters; a longer one is wrong. Gold answers have at most a few hundred."""

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# MATH's own solutions have `\boxed 5`. A number or a command: "write \boxed around it" boxes nothing.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)[^\S\n]*([-+]?(?:\.?\d|\\(?!boxed|fbox)[A-Za-z]+)"
    r"(?:\{(?:[^{}\n]|\{[^{}\n]*\})*\}|[^\s${}])*)"
)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:[,;]|[,;]?[\s$]*\b(?:and|or)\b)[\s$]*")
_STATEMENT = re.compile(r"(?:\b(?P<final>final)\s+)?\banswer(?:\s+is\b|\**\s*:)|####", re.IGNORECASE)
_MATHEMATICS = re.compile(r"[-+$\\(\[{\d.]")
_SPAN = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_GOES_ON = re.compile(r"\s*(?:,|and\b|or\b|,\s*and\b|,\s*or\b)\s*[$\\]")
_BOLD_ENDS = re.compile(r"\*\*(?=[\s.,;:!?)]|$)")
_SENTENCE_ENDS = re.compile(
    r"[.;](?=\s|$)|,?\s(?:i\.e\.|(?:because|since|as|so|which|where|when|that is|therefore|thus)\b)"
    r"|(?<=\d),\s(?!and\b|or\b)[a-z]{3}"
)


def final_answer(text: str) -> str | None:
    r"""The final answer: what the last complete box holds, else what is stated as the answer; None without either.

    - Boxes with only commas, `and` or `or` between them are the parts of one answer.
    - Without a box: what the last closed `<answer>` holds, or what follows the last `answer is`, `answer:` or `####`,
      on its line or the next one, up to the end of the sentence.
    - What follows `final answer is` after the last box, or stands in `<answer>` tags there, counts instead of the box
      where it begins as mathematics does.
    """
    boxes = _boxes(text) if "boxed" in text or "fbox" in text else []
    if not boxes:
        return next((answer for answer, _ in _stated(text)), None)
    later = (answer for answer, final in _stated(text[boxes[-1][1] :]) if final and _MATHEMATICS.match(answer))
    return next(later, None) or ", ".join(dict.fromkeys(_last_row(text, boxes)))


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Beginning, end and content of each complete box without a box in it, found in one pass."""
    found: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int, bool]] = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != "\\{":
            open_braces.append((match.start(), match.end(), len(token) > 1))
        elif token == "}" and open_braces:
            start, inside, is_box = open_braces.pop()
            if is_box and not (found and found[-1][0] > start):
                found.append((start, match.end(), text[inside : match.start()].strip()))
    bare = ((match.start(), match.end(), match[1].rstrip(".,;:")) for match in _BARE_BOX.finditer(text))
    return sorted([*found, *bare])


def _last_row(text: str, boxes: list[tuple[int, int, str]]) -> list[str]:
    """Contents of the last boxes that stand in one row."""
    row = [boxes[-1][2]]
    for before, after in pairwise(reversed(boxes)):
        if not _BETWEEN_BOXES.fullmatch(text[after[1] : before[0]][:50]):
            break
        row.insert(0, after[2])
    return row


def _stated(text: str) -> Iterator[tuple[str, bool]]:
    """Answers that are stated in words, the last one first, each with whether it is called final."""
    tagged = (last_answer(text) or "").strip()
    if tagged:
        yield tagged, True
    text = text[-10 * MAX_LENGTH :]
    marks = list(_STATEMENT.finditer(text))
    for number in range(len(marks) - 1, -1, -1):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        answer = _first_answer(text[marks[number].end() : end])
        if answer:
            yield answer, marks[number]["final"] is not None


def _first_answer(text: str) -> str:
    """The answer that a text begins with: mathematics between its signs, or words up to the end of the sentence."""
    text = text.lstrip(" \t\r\n:*_=")
    line = text.split("\n", 1)[0]
    span = _SPAN.match(text)
    if span and not _GOES_ON.match(text, span.end()):
        rest = text[span.end() : span.end() + 2].lstrip("\\")
        return f"{next(filter(None, span.groups())).strip()}{'%' if rest.startswith('%') else ''}"
    line = _BOLD_ENDS.split(line, 1)[0]
    return _SENTENCE_ENDS.split(line, 1)[0].strip(" \t\r*_")

"""The model's answers before training and after it, to the same prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estune.errors import EstuneError
from estune.journal.records import EvaluationRecord
from estune.study.report.runs import Run
from estune.study.report.tables import Row, read_rows, score_column
from estune.study.report.turns import turns_of
from estune.tasks.preflight import FULL_MARKS

SHOWN = {"better": 4, "low": 2, "worse": 2, "high": 1}
LONGEST = 4000  # characters of a text shown
UNSEEN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
UNSEEN |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}")
"""Pictures for control characters, which HTML forbids; and nothing for those that reverse the text after them."""
BOILERPLATE = 40  # characters that all prompts must share to be shown once


@dataclass(frozen=True)
class Sample:
    """One prompt, and the two answers to it."""

    kind: str  # better, low, worse or high
    prompt: str  # without what all prompts share
    before: Row
    after: Row


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same prompts."""

    before: EvaluationRecord
    after: EvaluationRecord
    score: str  # the column that is compared
    counts: dict[str, int]  # rows of each kind
    names: dict[str, str]  # the kinds in words
    opening: str  # of every prompt
    ending: str
    samples: list[Sample]


def compare(run: Run) -> Comparison:
    """The run's first evaluation beside its best.

    Raises:
        EstuneError: there are not two evaluations, or their completions were not kept or cannot be read.
    """
    before = run.first
    after = run.best
    if after is not None and after.step == getattr(before, "step", None):
        after = run.last  # nothing was ever better than the base: show where it led
    if before is None or after is None or before.step == after.step:
        raise EstuneError("only one evaluation yet")
    tables = [read_rows(run.directory.completions(f"evaluation-{e.step:05d}")) for e in (before, after)]
    pairs = _pairs(*tables)
    score = score_column(tables, (before, after)) or "reward"
    pairs = [(b, a) for b, a in pairs if b.get(score) is not None and a.get(score) is not None]
    if not pairs:
        raise EstuneError("the two evaluations have no prompt in common")
    values = {row[score] for pair in pairs for row in pair}
    right_or_wrong = values <= {0.0, FULL_MARKS}
    high = FULL_MARKS if right_or_wrong else statistics.median(a[score] for _, a in pairs)
    if high == min(values):
        high = max(values)  # most have the lowest score, which is not high
    kinds = [_kind(b[score], a[score], high) for b, a in pairs]
    prompts = [str(b["prompt"]) for b, _ in pairs]
    opening, ending = shared_ends(prompts)
    chosen: list[Sample] = []
    for kind, count in SHOWN.items():
        members = [i for i, k in enumerate(kinds) if k == kind]
        for i in _choose(members, pairs, score, count):
            middle = prompts[i][len(opening) : len(prompts[i]) - len(ending)]
            chosen.append(Sample(kind, readable(middle), _shown(pairs[i][0]), _shown(pairs[i][1])))
    names = (
        {"better": "turned right", "low": "stayed wrong", "worse": "turned wrong", "high": "stayed right"}
        if right_or_wrong
        else {"better": "gained", "low": "unchanged, low", "worse": "lost", "high": "unchanged, high"}
    )
    counts = {kind: kinds.count(kind) for kind in ("better", "high", "low", "worse")}
    return Comparison(before, after, score, counts, names, readable(opening), readable(ending), chosen)


def readable(text: str) -> str:
    """A text as it is shown; the middle of a long one is left out."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n… {len(text) - LONGEST:,} characters left out …\n{text[-half:]}"
    return text


def _pairs(before: list[Row], after: list[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows with the same prompt. As an evaluation set does not change, these are rows of the same number."""
    return [(b, a) for b, a in zip(before, after, strict=False) if b["prompt"] == a["prompt"]]


def _kind(before: float, after: float, high: float) -> str:
    if after != before:
        return "better" if after > before else "worse"
    return "high" if after >= high else "low"


def _choose(members: list[int], pairs: Sequence[tuple[Row, Row]], score: str, count: int) -> list[int]:
    """The pairs whose score and reward changed most and whose answers both ended; of many such, short and long ones."""

    def interest(i: int) -> tuple[Any, ...]:
        before, after = pairs[i]
        gain = abs((after["reward"] or 0.0) - (before["reward"] or 0.0))
        cut = not (after.get("finished", True) and before.get("finished", True))
        return -abs(after[score] - before[score]), before["completion"] == after["completion"], cut, -round(gain, 6)

    def size(i: int) -> int:
        return sum(len(row["completion"]) for row in pairs[i])

    ranked = sorted(members, key=lambda i: (interest(i), size(i)))
    equals = [i for i in ranked if interest(i) == interest(ranked[0])]
    if len(equals) <= count:
        return ranked[:count]
    return [equals[k * (len(equals) - 1) // count] for k in range(count)]


def shared_ends(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, in whole words, if it is long enough to be shown just once."""
    if len(prompts) < 2:
        return "", ""
    opening = _common(prompts)
    opening = opening[: max(opening.rfind(" "), opening.rfind("\n")) + 1]
    rest = [p[len(opening) :][::-1] for p in prompts]
    ending = _common(rest)
    ending = ending[: max(ending.rfind(" "), ending.rfind("\n")) + 1][::-1]
    return opening if len(opening) >= BOILERPLATE else "", ending if len(ending) >= BOILERPLATE else ""


def _common(texts: Sequence[str]) -> str:
    """The common beginning of all texts, which is that of the first and the last in alphabetical order."""
    first = min(texts)
    last = max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _shown(row: Row) -> Row:
    turns = [(who, readable(text)) for who, text in turns_of(row)]
    return {**row, "completion": readable(row["completion"]), "turns": turns}

"""A grader's answer as data: the grader writes it as JSON, and the trainer believes it only as far as it fits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from estune.errors import EstuneError, printable
from estune.grading.convention import Log, bounded
from estune.grading.wire import Garbled

Kind = Literal["score", "errors", "timeouts", "crashes", "too_long"]

_TEXT = 2000  # characters kept of a text
_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a call: a score (None: does not apply), or why there is none; what was logged; and notes."""

    kind: Kind
    score: float | None = None
    text: str = ""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def encode(self, call: int) -> bytes:
        """Encode it as JSON, in answer to the call of this number.

        Raises:
            TypeError, ValueError: JSON cannot hold a logged value.
        """
        fields = (call, self.kind, self.score, self.text, self.extras, self.metrics, self.counts, self.notes)
        return json.dumps(fields, separators=(",", ":")).encode()


def decode(answer: bytes, call: int) -> Verdict:
    """Decode the verdict that a grader sent in answer to the call of this number.

    Logged numbers beyond 64 bits, lists and objects become texts, as JSON writes them: their types on disk are not the
    grader's to choose.

    Raises:
        Garbled: it is no verdict.
    """
    try:
        found = json.loads(given := answer.decode())
        if "\\u" in given:
            # Halves of characters, which nothing can write, become question marks.
            found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
        number, kind, score, text, extras, metrics, counts, notes = found
        if number != call:
            raise Garbled("no verdict on this completion")
        if kind not in get_args(Kind) or not all(isinstance(part, str) for part in (text, *notes)):
            raise Garbled("no verdict")
        log = Log(1)
        for column, values in extras.items():
            log.extra(column, [_scalar(value) for value in values])
        for name, values in metrics.items():
            for value in values:
                log.metric(name, _number(value))
        for name, value in counts.items():
            log.count(name, _number(value))
        score = None if score is None else _number(score)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError, EstuneError) as error:
        raise Garbled(f"no verdict: {type(error).__name__}") from error
    notes = [printable(note[:_TEXT]) for note in notes]
    return Verdict(kind, score, printable(text[:_TEXT]), log.extras, log.metrics, log.counts, notes)


def decode_problem(answer: bytes) -> str:
    """Why a grader cannot begin, or the empty string.

    Raises:
        Garbled: it said something else.
    """
    try:
        problem = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Garbled("no text") from error
    if not isinstance(problem, str):
        raise Garbled("no text")
    return printable(problem[:_TEXT])


def _scalar(value: Any) -> Any:
    if isinstance(value, list | dict) or (isinstance(value, int) and value not in _INT64):
        return json.dumps(value, ensure_ascii=False)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Garbled("no number")
    return bounded(value)

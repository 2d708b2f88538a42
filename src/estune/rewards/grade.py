"""Reward functions applied to completions, with TRL's calling convention.

A reward function is called once per batch, by keyword: `prompts`, `completions`, `completion_ids` and every further
column of the data set as a list. It returns one float per completion, or None where it does not apply.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from estune.engines.base import Completion
from estune.errors import EstuneError

log = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None]]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grades:
    """Rewards of one batch: the weighted total of each completion, and each function's own scores."""

    total: list[float | None]
    scores: dict[str, list[float | None]]

    @property
    def mean(self) -> float | None:
        """Mean total over the completions that any function applied to; None if a score is not finite, or for none."""
        values = [t for t in self.total if t is not None]
        if not values or not all(map(math.isfinite, values)):
            return None
        return math.fsum(values) / len(values)

    def means(self) -> dict[str, float]:
        """Each function's mean over its finite scores; a function without any is left out."""
        finite = {
            name: [s for s in scores if s is not None and math.isfinite(s)] for name, scores in self.scores.items()
        }
        return {name: math.fsum(scores) / len(scores) for name, scores in finite.items() if scores}


def grade(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    rows: Sequence[Row],
    completions: Sequence[Completion],
) -> Grades:
    """Apply reward functions to the completions of `rows`, and add them up by weight.

    Raises:
        EstuneError: where a function raises or returns the wrong number of values.
    """
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    texts: list[Any] = [c.text for c in completions]
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    ids = [c.token_ids for c in completions]
    scores: dict[str, list[float | None]] = {}
    for function in functions:
        name = reward_name(function)
        try:
            returned = function(prompts=prompts, completions=texts, completion_ids=ids, **columns)
            values = [None if v is None else float(v) for v in returned]
        except Exception as error:
            raise EstuneError(
                f"reward {name} raised {type(error).__name__}: {error}; nothing is lost: mend it and resume"
            ) from error
        if len(values) != len(rows):
            raise EstuneError(f"reward {name} returned {len(values)} values for {len(rows)} completions: one each")
        bad = next((i for i, v in enumerate(values) if v is not None and not math.isfinite(v)), None)
        if bad is not None:
            log.warning("reward %s gave %s for %r: the member is left out", name, values[bad], texts[bad])
        scores[name] = values
    total = [_weighted([scores[reward_name(f)][i] for f in functions], weights) for i in range(len(rows))]
    return Grades(total, scores)


def reward_name(function: RewardFunction) -> str:
    """The name a reward function goes by in metrics."""
    return getattr(function, "__name__", type(function).__name__)


def _weighted(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    terms = [w * s for w, s in zip(weights, scores, strict=True) if s is not None]
    return math.fsum(terms) if terms and all(map(math.isfinite, terms)) else (math.nan if terms else None)

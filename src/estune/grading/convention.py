"""What a reward function is given and what it gives, in TRL's calling convention (TRL 1.16, `GRPOTrainer`).

A reward function is called once per batch, by keyword: `prompts`, `completions`, `completion_ids`, every further column
of the data set as a list, `trainer_state`, `log_extra` and `log_metric`. It returns one float per completion, or None
where it does not apply. It may be `async`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from estune.completion import Completion, Rendering
from estune.errors import EstuneError, printable

RewardFunction = Callable[..., Any]
Row = dict[str, Any]

FAILURES = ("errors", "timeouts", "crashes", "too_long")
"""Ways in which grading a completion can fail, as they are counted in metrics."""

LARGEST = 1e100
"""Scores and logged values beyond this count as infinite: of larger ones, sums and squares may be."""

_NO_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL does not pass these on
_OUR_RECORDS = ("step", "member", "prompt", "completion", "reward", "tokens", "finished")
_OUR_METRICS = (
    "step",
    "learning_rate",
    "num_tokens",
    "failed_members",
    "rewards/",
    "completions/",
    "time/",
    "weights/",
)


@dataclass
class TrainerState:
    """What a reward function may know of the run, under the names of transformers' `TrainerState`.

    `global_step` counts the steps done, of `max_steps`; `epoch` is how often the training set has been gone through.
    `rendering` is what the run tells chat templates.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    rendering: Rendering = field(default_factory=Rendering)


@dataclass(frozen=True, slots=True)
class Grades:
    """Rewards of one batch.

    Attributes:
        total: the weighted sum for each completion; None where no function applies, or one failed with an error.
        scores: each function's own scores.
        failures: for each function, how many completions failed in which of the ways in `FAILURES`.
        extras: columns that functions logged with `log_extra`, one value per completion.
        logged: values that functions logged with `log_metric`.
    """

    total: list[float | None]
    scores: dict[str, list[float | None]]
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean total over the completions that any function applied to; None if a score is not finite, or for none."""
        values = [t for t in self.total if t is not None]
        if not values or not all(map(math.isfinite, values)):
            return None
        return math.fsum(values) / len(values)

    def means(self) -> dict[str, float]:
        """Each function's mean over its finite scores; a function without any is left out."""
        return _means(self.scores)

    def logged_means(self) -> dict[str, float]:
        """Mean of what was logged under each name."""
        return _means(self.logged)


class Log:
    """What one function logs about one batch: the `log_extra` and `log_metric` it is given."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the completions' records, one value per completion."""
        if len(values) != self._size:
            raise EstuneError(
                f"log_extra({column!r}): {len(values)} values for {self._size} completions; give one each"
            )
        column = printable(column)
        if column in _OUR_RECORDS or column.startswith("rewards/"):
            raise EstuneError(f"log_extra({column!r}): a column of estune's own has this name; choose another")
        self.extras[column] = list(values)

    def metric(self, name: str, value: float) -> None:
        """Add a value to the step's metric of this name, their mean."""
        name = printable(name)
        if name == "reward" or name.startswith((*_OUR_METRICS, "reward_", "eval_")):
            raise EstuneError(f"log_metric({name!r}): estune's own metrics are called so; choose another name")
        self.metrics.setdefault(name, []).append(bounded(value))


class Batch:
    """Completions of rows as the arguments of reward functions."""

    def __init__(self, rows: Sequence[Row], completions: Sequence[Completion], state: TrainerState) -> None:
        texts: list[Any] = [c.text for c in completions]
        if not isinstance(rows[0]["prompt"], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        self.lengths = [len(c.text) for c in completions]
        self.state = state
        self.columns: dict[str, list[Any]] = {
            **{key: [row[key] for row in rows] for key in rows[0] if key not in _NO_COLUMNS},
            "prompts": [row["prompt"] for row in rows],
            "completions": texts,
            "completion_ids": [c.token_ids for c in completions],
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> dict[str, list[Any]]:
        """The columns of one completion, as lists of length one."""
        return {key: values[index : index + 1] for key, values in self.columns.items()}

    def show(self, index: int) -> str:
        """A completion, shortened for a message."""
        return repr(self.columns["completions"][index])[:100]


def arguments(columns: Mapping[str, Any], state: TrainerState, log: Log) -> dict[str, Any]:
    """All that a reward function is called with."""
    return {**columns, "trainer_state": state, "log_extra": log.extra, "log_metric": log.metric}


def as_scores(returned: Any, size: int) -> list[float | None]:
    """What a reward function returned, as floats, those beyond `LARGEST` infinite.

    Raises:
        EstuneError: not one value per completion.
        TypeError, ValueError: no list, or not of numbers.
    """
    values = [None if v is None else bounded(v) for v in returned]
    if len(values) != size:
        raise EstuneError(f"returned {len(values)} values for {size} completions: one each")
    return values


def bounded(value: Any) -> float:
    """A number as a float, infinite beyond `LARGEST`.

    Raises:
        TypeError, ValueError: it is no number.
    """
    number = float(value)
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def describe(error: BaseException) -> str:
    """What went wrong in a reward function, in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, EstuneError):
        return text
    hint = "; end its parameters with **kwargs" if "got an unexpected keyword argument" in text else ""
    return f"raised {type(error).__name__}: {text}{hint}"


def reward_name(function: RewardFunction) -> str:
    """The name a reward function goes by in metrics, as in TRL: a partial's is that of what it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: RewardFunction) -> bool:
    """Whether calling it returns a coroutine, as TRL decides: also for partials and for objects with a `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def weighted(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The sum of scores times weights over those that apply; None where none does, NaN where one is not finite."""
    terms = [bounded(w * s) for w, s in zip(weights, scores, strict=True) if s is not None]
    return math.fsum(terms) if terms and all(map(math.isfinite, terms)) else (math.nan if terms else None)


def _means(columns: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    finite = {name: [v for v in values if v is not None and math.isfinite(v)] for name, values in columns.items()}
    return {name: math.fsum(values) / len(values) for name, values in finite.items() if values}

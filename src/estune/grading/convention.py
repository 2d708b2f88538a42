"""What a reward function is called with and returns: TRL's calling convention (TRL 1.16, `GRPOTrainer`).

A reward function is called once per batch, by keyword: `prompts`, `completions`, `completion_ids`, every further column
of the data set as a list, `trainer_state`, `log_extra` and `log_metric`. It returns one float per completion, None or
NaN where it does not apply, or an exception where this one could not be graded. It may be `async`. It may change its
arguments, which are copies.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import site
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from estune.completion import Completion, Rendering
from estune.errors import EstuneError, printable
from estune.grading.level import Level

RewardFunction = Callable[..., Any]
Function = TypeVar("Function", bound=RewardFunction)
Row = dict[str, Any]

FAILURES = ("errors", "timeouts", "crashes", "too_long")
"""Ways in which grading a completion can fail, as they are counted in metrics."""

LARGEST = 1e100
"""Scores and logged values beyond this count as infinite, as their sums and squares might be."""

_OURS = os.path.join(str(Path(__file__).parents[1]), "")
_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    )
)
_ATOMS = frozenset((str, bytes, int, float, complex, bool, type(None)))
_NO_LISTS = (str, bytes, bytearray, memoryview)  # though one can go through them
_NO_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL does not pass these on
_OUR_RECORDS = ("step", "member", "prompt", "completion", "reward", "tokens", "finished")
_OUR_METRICS = (
    "step",
    "learning_rate",
    "num_tokens",
    "tokens_per_second",
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
        logged: values that functions logged with `log_metric`, by name.
        counts: for each function, the sums of what it logged with `log_metric(..., total=True)`.
    """

    total: list[float | None]
    scores: dict[str, list[float | None]]
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean total over completions to which any function applies; None without any, or if a score is not finite."""
        values = [t for t in self.total if t is not None]
        if not values or not all(map(math.isfinite, values)):
            return None
        return math.fsum(values) / len(values)

    def means(self) -> dict[str, float]:
        """Each function's mean over its finite scores. A function without any is left out."""
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
        self.counts: dict[str, float] = {}

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

    def metric(self, name: str, value: float, *, total: bool = False) -> None:
        """Add a value to the step's metric of this name, a mean; with `total`, to the sum `rewards/FUNCTION/name`."""
        if total:
            self.count(name, value)
            return
        name = printable(name)
        if is_ours(name):
            raise EstuneError(f"log_metric({name!r}): estune's own metrics are called so; choose another name")
        self.metrics.setdefault(name, []).append(bounded(value))

    def count(self, name: str, value: float) -> None:
        """Add to a count of the function's, which is summed over the members of a step."""
        name = printable(name)
        if name == "mean" or name in FAILURES:
            raise EstuneError(
                f"log_metric({name!r}, total=True): estune's own metrics are called so; choose another name"
            )
        self.counts[name] = bounded(self.counts.get(name, 0) + value)


def is_ours(name: str) -> bool:
    """Whether estune keeps the name of a metric for itself, so that no function can log under it."""
    return name == "reward" or name.startswith((*_OUR_METRICS, "reward_", "eval_"))


class Batch:
    """Completions of rows as the arguments of reward functions."""

    def __init__(self, rows: Sequence[Row], completions: Sequence[Completion], state: TrainerState) -> None:
        texts: list[Any] = [c.text for c in completions]
        if not isinstance(rows[0]["prompt"], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        self.lengths = [len(c.text) for c in completions]
        self.played = [c.played for c in completions]
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


class Population:
    """What all members wrote for the same rows, as the arguments of a population-level function."""

    def __init__(self, members: Sequence[Batch]) -> None:
        self.columns: dict[str, list[Any]] = dict(members[0].columns)
        for name in ("completions", "completion_ids"):
            self.columns[name] = [member.columns[name] for member in members]

    def __len__(self) -> int:
        return len(self.columns["completions"])


def copied(value: Any, uncopied: list[Any] | None = None) -> Any:
    """A deep copy of what a column holds. What cannot be copied stays the same object, and is added to `uncopied`."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list and _ATOMS.issuperset(map(type, value)):
        return list(value)
    with suppress(Exception):
        # Lists of lists are most of it, and `deepcopy` takes ten times as long over them.
        if kind is list:
            return [copied(item, uncopied) for item in value]
        if kind is dict:
            return {key: copied(item, uncopied) for key, item in value.items()}
        return copy.deepcopy(value)
    if uncopied is not None:
        uncopied.append(value)
    return value


def arguments(columns: Mapping[str, Any], state: TrainerState, log: Log) -> dict[str, Any]:
    """The arguments of a reward function: copies, so that no call sees what another has changed."""
    return {**copied(columns), "trainer_state": replace(state), "log_extra": log.extra, "log_metric": log.metric}


def as_scores(returned: Any, size: int, level: Level = "completion") -> list[float | Exception | None]:
    """What a reward function returned as floats, infinite beyond `LARGEST`; exceptions stay as they are.

    Args:
        returned: a value for each completion, one in all from a corpus-level function, or one for each member.
        size: the number of completions, or of members.
        level: the function's.

    Raises:
        EstuneError: it is something else, or not as many numbers, Nones or exceptions as there should be.
    """
    if level == "corpus":
        return [_score(returned, "all completions: it is corpus-level")] * size
    what = "completion" if level == "completion" else "member"
    if (
        isinstance(returned, (*_NO_LISTS, Mapping, set, frozenset))
        or not isinstance(returned, Iterable)
        or getattr(returned, "ndim", 1) == 0
    ):
        raise EstuneError(f"returned {returned!r:.60} ({type(returned).__name__}), not a list of numbers")
    values = [_score(value, f"{what} {number}") for number, value in enumerate(returned)]
    if len(values) != size:
        raise EstuneError(f"returned {len(values)} values for {size} {what}s: one each")
    return values


def _score(value: Any, of: str) -> float | Exception | None:
    if value is None or isinstance(value, Exception):
        return value
    # An array of one number would pass for the number; a tensor on `meta` has none.
    if not isinstance(value, (*_NO_LISTS, complex)) and not getattr(value, "ndim", 0):
        with suppress(TypeError, ValueError, RuntimeError):
            return bounded(value)
    raise EstuneError(f"returned {value!r:.60} ({type(value).__name__}) for {of}, not a number or None")


def bounded(value: Any) -> float:
    """A number as a float, infinite beyond `LARGEST`.

    Raises:
        TypeError, ValueError: the value is no number.
    """
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def describe(error: BaseException) -> str:
    """What went wrong in a reward function, and where, in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, EstuneError):
        return text
    hint = "; end its parameters with **kwargs" if "got an unexpected keyword argument" in text else ""
    return f"raised {type(error).__name__}: {text}{place(error)}{hint}"


def place(error: BaseException) -> str:
    """The user's file and line that an error comes from, as ` (FILE:LINE)`; empty if there is none.

    It is the innermost line outside of estune and, if possible, outside of installed packages.
    """
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    frames = [(name, line) for name, line in frames if not name.startswith((_OURS, "<"))]
    mine = [frame for frame in frames if not frame[0].startswith(_INSTALLED)] or frames
    if not mine:
        return ""
    name, line = mine[-1]
    return f" ({name.removeprefix(os.path.join(os.getcwd(), ''))}:{line})"


def reward_name(function: RewardFunction) -> str:
    """The name of a reward function in metrics, as in TRL. A partial has that of what it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def share(function: Function) -> Function:
    """Declare that a reward function's scores lie in 0 to 1, so that as accuracy they are shown in percent."""
    setattr(function, "share", True)  # noqa: B010 - a function has no such attribute to the type checker
    return function


def checked(check: Callable[[Row], object]) -> Callable[[Function], Function]:
    """Have the rows of a reward function looked at before training.

    Args:
        check: raises an `EstuneError` for a row that could not be graded.
    """

    def check_rows(rows: Sequence[Row]) -> None:
        for number, row in enumerate(rows):
            try:
                check(row)
            except EstuneError as error:
                raise EstuneError(f"row {number}: {error}") from error

    def decorate(function: Function) -> Function:
        setattr(function, "check_rows", check_rows)  # noqa: B010
        return function

    return decorate


def is_async(function: RewardFunction) -> bool:
    """Whether calling it returns a coroutine, as TRL decides: also for partials and for objects with a `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def weighted(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The weighted sum of the scores that apply; None if none does, NaN if one is not finite."""
    terms = [bounded(w * s) for w, s in zip(weights, scores, strict=True) if s is not None]
    return math.fsum(terms) if terms and all(map(math.isfinite, terms)) else (math.nan if terms else None)


def without_nan(scores: Sequence[float | None]) -> list[float | None]:
    """Scores with None for NaN: both say that a function does not apply, as in TRL."""
    return [None if score is None or math.isnan(score) else score for score in scores]


def _means(columns: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    finite = {name: [v for v in values if v is not None and math.isfinite(v)] for name, values in columns.items()}
    return {name: math.fsum(values) / len(values) for name, values in finite.items() if values}

"""A task: rows to train on, rows to evaluate on, and the rewards that grade them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import fsum, inf, isfinite
from typing import Any

from estune.completion import Prompt
from estune.errors import EstuneError
from estune.grading.convention import RewardFunction, Row, reward_name
from estune.grading.level import refuse_level
from estune.grading.rollout import Rollout
from estune.tasks.pictures import pictures_of, shown_with, with_pictures
from estune.tasks.records import whole_rows


@dataclass(frozen=True)
class Stage:
    """Part of a run: which training rows it draws from, and when it ends (never, for the last one).

    It ends at step `until_step`, or at the first evaluation where accuracies are at least those of `until_accuracy`: of
    all rows under "", else of the rows with this value in the task's `group`. With neither, it does not end.
    """

    rows: Sequence[int]
    until_step: int | None = None
    until_accuracy: Mapping[str, float] = field(default_factory=dict)

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation's metrics (`eval_accuracy`, `eval_accuracy/GROUP`) have the accuracies that end it."""
        wanted = {f"eval_accuracy/{group}" if group else "eval_accuracy": a for group, a in self.until_accuracy.items()}
        return bool(wanted) and all(metrics.get(key, -inf) >= accuracy for key, accuracy in wanted.items())


@dataclass(frozen=True)
class Task:
    """Data, prompt and rewards under one name.

    A row holds `prompt` (a string, or a list of messages) and the columns that the reward functions take. The reward of
    a completion is the sum of `reward_weights[i]` times what `reward_funcs[i]` gives it. `accuracy` names the reward
    function whose mean over a set is called accuracy; of several, the first that applies to a row counts.

    `gold` gives, for a row, a completion that must earn full marks, or None where none is known. `group` names a column
    by whose values accuracies are also told apart. `stages` say which training rows are drawn from, and until when;
    none: all of them, always. A task without `accuracy` has no evaluation set. Both sets become lists, whatever kind of
    sequence they are given as.

    A prompt that is text stays text for reward functions, and so do its completions. `chat` says whether a model that
    has a chat template is shown it as a user's message; None is False, but True in a task's file. `show` says so row by
    row instead: what a model is shown for a row, with or without a template. `rollout` is what plays a row, where a
    completion alone is not the end of it; then `FromRollout()` is one of the reward functions. `answer` reads the final
    answer off a completion, written in one way, or None where there is none: by it ensembles vote.

    Raises:
        EstuneError: an empty set, a prompt in both sets, weights that do not match the functions, an unknown accuracy.
    """

    name: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    reward_funcs: list[RewardFunction]
    reward_weights: list[float]
    accuracy: str | Sequence[str] | None
    gold: Callable[[Row], str | None] | None = None
    group: str | None = None
    stages: Sequence[Stage] = field(default=())
    chat: bool | None = None
    show: Callable[[Row, bool], Prompt] | None = None
    rollout: Rollout | None = None
    answer: Callable[[str], str | None] | None = None

    def __post_init__(self) -> None:
        for side in ("train", "evaluation"):
            # A slice of a data set of the library datasets is no list of rows.
            whole = whole_rows(list(getattr(self, side)), f"task {self.name}: {side} set")
            kind = "training" if side == "train" else side
            object.__setattr__(self, side, with_pictures(whole, f"task {self.name}: {kind} row"))
        names = [reward_name(function) for function in self.reward_funcs]
        if len(self.reward_weights) != len(names):
            raise EstuneError(
                f"task {self.name}: {len(names)} reward functions but {len(self.reward_weights)} weights; give one each"
            )
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise EstuneError(
                f"task {self.name}: two reward functions are called {double}; give each a name of its own"
            )
        unknown = next((name for name in self.accuracies if name not in names), None)
        if unknown is not None or (self.evaluation and not self.accuracies):
            raise EstuneError(f"task {self.name}: accuracy is {unknown!r}; choose one of {', '.join(names)}")
        telling = [function for function in self.reward_funcs if reward_name(function) in self.accuracies]
        where = f"task {self.name}: accuracy"
        refuse_level(telling, where, "an evaluation has one set of weights, not members to compare", "population")
        if self.group is not None:
            refuse_level(telling, where, f"has one value for all groups of {self.group}", "corpus")
        sides: dict[str, Sequence[Row]] = {"training": self.train} | (
            {} if self.accuracy is None else {"evaluation": self.evaluation}
        )
        for side, rows in sides.items():
            if not rows:
                raise EstuneError(f"task {self.name}: the {side} set is empty; give it at least one row")
            _check_columns(f"task {self.name}: {side} row", rows)
        self._have_rows_checked(sides)
        refuse_overlap(
            self.name,
            *(
                (
                    _canonical([row["prompt"], *pictures])
                    if (pictures := pictures_of(row))
                    else _canonical(row["prompt"])
                    for row in rows
                )
                for rows in (self.train, self.evaluation)
            ),
        )

    def _have_rows_checked(self, sides: Mapping[str, Sequence[Row]]) -> None:
        """Let reward functions that have a `check_rows` refuse rows before any is trained on."""
        for function in self.reward_funcs:
            check: Callable[[Sequence[Row]], None] = getattr(function, "check_rows", lambda _: None)
            for side, rows in sides.items():
                try:
                    check(rows)
                except EstuneError as error:
                    raise EstuneError(f"task {self.name}: {side} {error}") from error

    @property
    def accuracies(self) -> list[str]:
        """Names of the reward functions that tell accuracy."""
        return [self.accuracy] if isinstance(self.accuracy, str) else list(self.accuracy or ())

    @property
    def accuracy_is_share(self) -> bool:
        """Whether accuracy lies in 0 to 1 by declaration: each function that tells it has an attribute `share`."""
        named = {reward_name(function): function for function in self.reward_funcs}
        return bool(self.accuracies) and all(getattr(named[name], "share", False) is True for name in self.accuracies)

    def accuracy_of(self, rows: Sequence[Row], scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
        """Mean accuracy of all rows under the key "", and of each value of the column `group` under that value.

        Rows to which no accuracy applies, or whose score is not finite, are left out. A mean without rows is missing.

        Args:
            rows: the rows that were graded.
            scores: for each reward function, its score of each row.
        """
        found: dict[str, list[float]] = {}
        for i, row in enumerate(rows):
            values = (scores[name][i] for name in self.accuracies)
            value = next((value for value in values if value is not None), None)
            if value is not None and isfinite(value):
                for key in ("", str(row[self.group])) if self.group else ("",):
                    found.setdefault(key, []).append(value)
        return {key: fsum(values) / len(values) for key, values in found.items()}

    def shown(self, row: Row, *, template: bool) -> Prompt:
        """What a model is shown for a row: messages, or text as it is.

        Args:
            row: one of either set.
            template: whether the model has a chat template.
        """
        prompt: Prompt = row["prompt"]
        if isinstance(prompt, str):
            if self.show is not None:
                prompt = self.show(row, template)
            elif self.chat:
                prompt = as_message(row, template)
        pictures = pictures_of({**row, "prompt": None})
        return shown_with(prompt, pictures) if pictures else prompt

    def data_hash(self) -> str:
        """Hash of both sets, in order, with prompts as a model with a chat template is shown them.

        Runs with equal hashes saw equal data.
        """
        train, evaluation = (
            [{**row, "prompt": self.shown(row, template=True)} for row in rows]
            for rows in (self.train, self.evaluation)
        )
        return data_hash([*train, {"side": "evaluation"}, *evaluation])


def as_message(row: Row, template: bool) -> Prompt:
    """A prompt that is text as a user's message, where there is a chat template; else as it is."""
    text: str = row["prompt"]
    return [{"role": "user", "content": text}] if template else text


def _check_columns(where: str, rows: Sequence[Row]) -> None:
    """Refuse rows without a prompt, or without a column that others have."""
    if "prompt" not in rows[0]:
        raise EstuneError(f"{where} 0 has no column prompt, only {', '.join(rows[0]) or 'none'}; give it one")
    columns = rows[0].keys()
    for number, row in enumerate(rows):
        if row.keys() != columns:
            raise EstuneError(
                f"{where} {number} has the columns {', '.join(row)}, row 0 has {', '.join(columns)}; give all the same"
            )


def data_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """32 hexadecimal digits of BLAKE2b over the rows as canonical JSON, one a line."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(_canonical(row).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def refuse_overlap(name: str, train: Iterable[str], evaluation: Iterable[str]) -> None:
    """Check that no example is both trained and evaluated on. Both sets are given as texts that identify examples.

    Raises:
        EstuneError: some are in both; the message has their number and the first of them.
    """
    held_out = list(evaluation)
    # Looked up in the evaluation set, the smaller one: a training set of half a million prompts is not held twice.
    shared = set(held_out).intersection(train)
    if shared:
        count = sum(text in shared for text in held_out)
        first = next(text for text in held_out if text in shared)
        first = first if len(first) <= 200 else f"{first[:130]} ... {first[-60:]}"
        raise EstuneError(
            f"task {name}: {count} of {len(held_out)} evaluation examples are in the training set too, the first: "
            f"{first}; take them out of one of the two"
        )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)

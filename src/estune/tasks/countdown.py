"""Countdown (arXiv 2509.24372): reach a target with given numbers and + - * /."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.countdown import answer_reward, format_reward, parse_numbers, parse_target, plain_answer
from estune.tasks.base import Task, refuse_overlap
from estune.tasks.countdown_problems import Problem, Side, countdown_prompt, generate_problems, is_held_out
from estune.tasks.options import TaskOptions
from estune.tasks.records import Record, load_records, require_columns

GENERATED_SIZE = 200


def _span(value: Any) -> Any:
    """A range as `3-4`, a single number, or a pair."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split("-")]
        if not 1 <= len(parts) <= 2 or not all(part.isdecimal() for part in parts):
            raise ValueError("write a range of whole numbers like 3-4, or one number")
        value = [int(part) for part in parts]
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, Sequence) and len(value) == 1:
        value = [value[0], value[0]]
    if isinstance(value, Sequence) and len(value) == 2 and value[0] > value[1]:
        raise ValueError("a range starts with its smaller number")
    return value


Range = Annotated[tuple[int, int], BeforeValidator(_span)]


class CountdownConfig(TaskOptions):
    """Options of the Countdown task: generated problems, or those of a file or a hub data set."""

    summary: ClassVar[str] = "reach a target with given numbers and + - * / (the paper's)"
    usual_data: ClassVar[str] = "generated"

    name: Literal["countdown"] = Field("countdown", description="the task")
    train_size: int | None = Field(
        None, ge=1, description="training problems; 200, as in the paper, if generated, or all that the data holds"
    )
    eval_size: int | None = Field(
        None, ge=1, description="held-out problems; 200 if generated, or all that the data holds"
    )
    count: Range = Field((3, 4), description="how many numbers a generated problem has, like 3 or 3-4")
    numbers: Range = Field((1, 99), description="smallest and largest number of a generated problem")
    target: Range = Field((10, 99), description="smallest and largest target of a generated problem")
    rational: bool = Field(False, description="let generated problems have fractions as intermediate results")
    seed: int | None = Field(None, description="seed of the generated training problems; the run's seed if not given")
    eval_seed: int = Field(
        0, description="seed of the generated held-out problems; the same for all runs unless changed"
    )
    data: str | None = Field(
        None, description="file, directory or hub id with columns numbers or nums, target, and optionally context"
    )
    split: str = Field("train", description="split of `data`, where it has several")
    eval_data: str | None = Field(
        None,
        description="as `data`, to evaluate on; if not given, an eighth of `data` is held out, by a hash of each row",
    )
    eval_split: str = Field("test", description="split of `eval_data`, where it has several")

    @model_validator(mode="after")
    def _check(self) -> "CountdownConfig":
        if self.count[0] < 2:
            raise ValueError(f"count starts at {self.count[0]}, and a problem needs at least 2 numbers")
        return self

    def build(self, seed: int) -> Task:
        """Both sets, and the paper's reward: answer + 0.1 * format.

        Args:
            seed: the run's, for generated training problems where the options name no seed of their own.

        Raises:
            EstuneError: data that is missing, malformed or overlapping, or ranges that hold too few problems.
        """
        train, evaluation = self.sets(seed)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[answer_reward, format_reward],
            reward_weights=[1.0, 0.1],
            accuracy=answer_reward.__name__,
            answer=plain_answer,
        )

    def sets(self, seed: int) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and to evaluate on; as `build`."""
        if self.data and not self.eval_data:
            return self._split(_read(self.data, self.split), lambda row: is_held_out(_problem(row)))
        if self.data:
            train = list(islice(_read(self.data, self.split), self.train_size))
        else:
            train = self._generated("train", self.train_size, seed if self.seed is None else self.seed)
        if not self.eval_data:
            return train, self._generated("evaluation", self.eval_size, self.eval_seed)
        evaluation = list(islice(_read(self.eval_data, self.eval_split), self.eval_size))
        refuse_overlap(self.name, map(_identity, train), map(_identity, evaluation))
        return train, evaluation

    def _generated(self, side: Side, size: int | None, seed: int) -> list[Row]:
        problems = generate_problems(
            size or GENERATED_SIZE,
            side,
            seed,
            count=self.count,
            numbers=self.numbers,
            target=self.target,
            rational=self.rational,
        )
        return [_row(problem.numbers, problem.target) for problem in problems]


def _read(source: str, split: str) -> Iterator[Row]:
    return countdown_rows(source, load_records(source, split))


def countdown_rows(source: str, records: Sequence[Record]) -> Iterator[Row]:
    """Rows with prompt, numbers and target, one by one, from records in the authors' shape or TinyZero's.

    A record's own `context` is its prompt; where it has none, the paper's layout is.

    Raises:
        EstuneError: a missing column, or a bad value, with the row it is in (the first is row 1).
    """
    numbers_name, target_name = require_columns(source, records, ("numbers", "nums"), ("target",))
    for number, record in enumerate(records, 1):
        where = f"data {source}: row {number}"
        numbers = record.get(numbers_name)
        target = record.get(target_name)
        try:
            numbers = parse_numbers(numbers)
        except EstuneError as error:
            raise EstuneError(f"{where}: {numbers_name} is {numbers!r:.80}; give a list of whole numbers") from error
        try:
            parse_target(target)
        except EstuneError as error:
            raise EstuneError(f"{where}: {target_name} is {target!r:.80}; give a number like 98 or 27.4") from error
        context = record.get("context")
        if context is not None and not isinstance(context, str):
            raise EstuneError(f"{where}: context is {context!r:.80}; give the prompt as text, or leave it out")
        yield _row(numbers, target, context)


def _row(numbers: Sequence[int], target: Any, context: str | None = None) -> Row:
    return {"prompt": context or countdown_prompt(numbers, target), "numbers": list(numbers), "target": target}


def _problem(row: Row) -> Problem:
    return Problem(tuple(row["numbers"]), parse_target(row["target"])[0])


def _identity(row: Row) -> str:
    numbers, target = _problem(row).key
    return f"{' '.join(map(str, numbers))} -> {target}"

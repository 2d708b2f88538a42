"""Conciseness (arXiv 2509.24372): answer as briefly as the reference does, and still answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import ClassVar, Literal

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.conciseness import correct_reward, length_reward
from estune.tasks import conciseness_facts as facts
from estune.tasks.base import Task
from estune.tasks.options import DataOptions, text_of
from estune.tasks.records import Record, require_columns


class ConcisenessConfig(DataOptions):
    """Options of the conciseness task: the facts that the embedded model knows, or your own questions."""

    summary: ClassVar[str] = "answer as briefly as a reference (the paper's), and correctly"
    usual_data: ClassVar[str] = "the embedded model's facts"

    name: Literal["conciseness"] = Field("conciseness", description="the task")
    data: str | None = Field(
        None,
        description="file, directory or hub id with columns question or prompt, and answer, the brief reference; if "
        "not given, the facts that the embedded model knows",
    )
    correct_weight: float = Field(
        1.0, ge=0, description="worth of the reference's words being in the completion; 0 leaves the paper's reward"
    )
    length_weight: float = Field(
        0.01,
        ge=0,
        description="cost of a character more or less than the reference has; the paper's reward is 1 a char",
    )

    def build(self, seed: int) -> Task:
        """Both sets, and correctness minus the difference in length.

        Raises:
            EstuneError: data that is missing, malformed or overlapping.
        """
        train, evaluation = self.read(self._rows) if self.data else self._facts()
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[correct_reward, length_reward],
            reward_weights=[self.correct_weight, self.length_weight],
            accuracy=correct_reward.__name__,
            gold=lambda row: str(row["answer"]),
        )

    def _facts(self) -> tuple[list[Row], list[Row]]:
        """The facts, split as when the model was taught: the held-out questions are new to it."""
        if self.eval_data:
            raise EstuneError("task conciseness: eval_data is given without data; give both, or neither")
        rows = [(facts.is_held_out(question), self._row(question, f"{word.capitalize()}."))
                for question, word in facts.all_facts()]  # fmt: skip
        train = islice((row for held_out, row in rows if not held_out), self.train_size)
        return list(train), list(islice((row for held_out, row in rows if held_out), self.eval_size))

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        question, answer = require_columns(source, records, ("question", "prompt"), ("answer",))
        for number, record in enumerate(records, 1):
            where = f"data {source}: row {number}"
            yield self._row(text_of(record, question, where), text_of(record, answer, where))

    def _row(self, question: str, answer: str) -> Row:
        return {"prompt": self.prompt(question), "answer": answer}

r"""Mathematics: problems with a gold answer, answered in `\boxed{}`. Trains on GSM8K or MATH, or on your own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.answers import final_answer
from estune.rewards.math import math_reward, plain_answer
from estune.tasks.base import Task
from estune.tasks.options import DataOptions, text_of
from estune.tasks.records import Record, is_nan, require_columns

# name: (id on the hub, split), what it is usually trained or evaluated with.
TRAINING_SETS = {
    "gsm8k": ("openai/gsm8k:main", "train"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "train"),
}
EVALUATION_SETS = {
    "gsm8k": ("openai/gsm8k:main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "minerva": ("math-ai/minervamath", "test"),
    "olympiad": ("math-ai/olympiadbench", "test"),
    "amc": ("AI-MO/aimo-validation-amc", "train"),
    "aime": ("HuggingFaceH4/aime_2024", "train"),
}
USUAL = {"gsm8k": "gsm8k", "math": "math500"}

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


class MathConfig(DataOptions):
    """Options of the math task."""

    summary: ClassVar[str] = "problems with one right answer: GSM8K, MATH and their like"
    usual_data: ClassVar[str] = "openai/gsm8k"

    name: Literal["math"] = Field("math", description="the task")
    data: str | None = Field(
        "gsm8k",
        description="gsm8k, math, or a file, directory or hub id with columns problem or question, and answer, "
        "final_answer or solution",
    )
    eval_data: str | None = Field(
        None,
        description="gsm8k, math500, minerva, olympiad, amc, aime, or as `data`; several with commas between; if not "
        "given, gsm8k's or math500 for gsm8k and math, else an eighth of `data`, by a hash of each problem",
    )
    levels: str | None = Field(
        None, pattern=r"^[1-5](-[1-5])?$", description="levels of MATH to train on, like 3-5; all if not given"
    )
    instruction: str = Field(INSTRUCTION, description="what follows each problem in the prompt")

    def sources(self) -> tuple[tuple[str, str], list[tuple[str, str]]]:
        """Sources with the names of known sets replaced by their ids and splits."""
        (data, split), others = super().sources()
        if not others and data in USUAL:
            others = [(USUAL[data], "")]
        known = [EVALUATION_SETS.get(name, (name, part)) for name, part in others]
        return TRAINING_SETS.get(data, (data, split)), known

    def build(self, seed: int) -> Task:
        """Both sets, and 1 for a right answer.

        Raises:
            EstuneError: data that is missing, malformed or overlapping.
        """
        train, evaluation = self.read(self._rows)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[math_reward],
            reward_weights=[1.0],
            accuracy=math_reward.__name__,
            gold=lambda row: f"\\boxed{{{row['answer'][0]}}}",
            group="source",
            answer=plain_answer,
        )

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        problem, answer = require_columns(
            source, records, ("problem", "question"), ("answer", "final_answer", "solution")
        )
        # Levels are of the training set alone: evaluated is what everybody evaluates.
        levels = self._levels() if self.levels and source == self.sources()[0][0] else None
        if levels:
            require_columns(source, records, ("level",))
        for number, record in enumerate(records, 1):
            if levels and str(record.get("level")).removeprefix("Level ").removesuffix(".0") not in levels:
                continue
            where = f"data {source}: row {number}"
            golds = gold_answers(record.get(answer))
            if not golds:
                raise EstuneError(
                    f"{where}: {answer} is {record.get(answer)!r:.80}; give the final answer, a text that ends in "
                    "`#### ANSWER`, or one with a \\boxed{ANSWER}"
                )
            text = f"{text_of(record, problem, where).strip()}\n\n{self.instruction}".strip()
            yield {"prompt": self.prompt(text), "answer": golds, "source": source}

    def _levels(self) -> set[str]:
        first = (self.levels or "")[0]
        last = (self.levels or "")[-1]
        return {str(level) for level in range(int(first), int(last) + 1)}


def gold_answers(value: Any) -> list[str]:
    r"""Every answer that counts as right, from a column of any of the known sets; none where there is none.

    GSM8K's stands after `####`, with commas in large numbers; MATH's in the solution's last box; AMC's is a float;
    OlympiadBench's and Minerva's are lists.
    """
    if isinstance(value, list):
        return list(dict.fromkeys(gold for item in value for gold in gold_answers(item)))
    if is_nan(value):
        return []
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if not isinstance(value, str):
        return []
    if "####" in value:
        text = value.rpartition("####")[2].replace(",", "")
    elif "\\boxed" in value or "\\fbox" in value:
        text = final_answer(value) or ""
    else:
        text = value
    text = text.strip()
    return [text] if text else []

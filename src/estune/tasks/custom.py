"""Your own prompts, from a file or the hub, and your own functions or a judge to grade them, all by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from estune.errors import EstuneError
from estune.grading.convention import Row, reward_name
from estune.grading.rollout import by_program, with_rollout
from estune.rewards.judge import Judge, JudgeConfig
from estune.rewards.load import in_conversation, load_reward
from estune.rewards.text import listed
from estune.tasks.base import Task
from estune.tasks.options import DataOptions
from estune.tasks.records import Record, is_nan, require_columns


class CustomConfig(DataOptions):
    """Options of the task custom."""

    summary: ClassVar[str] = "your own prompts, graded by functions that you name or by a judge"
    usual_data: ClassVar[str] = "task.data"

    name: Literal["custom"] = Field("custom", description="the task")
    prompt_column: str = Field("prompt", description="column of the prompts: text, or messages")
    gold_column: str | None = Field(None, description="column of completions that must earn full marks, to check that")
    rewards: Annotated[list[str], BeforeValidator(listed)] = Field(
        [],
        description="reward functions, with commas between: package.module.function, path/to/file.py:function, or a "
        "reward model",
    )
    reward_weights: Annotated[list[float] | None, BeforeValidator(listed)] = Field(
        None, description="one for each of them, the judge's last; 1 if not given"
    )
    judge: JudgeConfig | None = Field(
        None, description="a language model that scores completions by a rubric: a further reward, after the others"
    )
    program: str | None = Field(
        None,
        description="a command that plays a row: it finds the model at OPENAI_BASE_URL, the row on standard input, and "
        "prints the reward last",
    )
    accuracy: str | None = Field(
        None,
        description="name of the reward function, or of the program's metric, whose mean is accuracy; the first if not "
        "given",
    )

    def build(self, seed: int) -> Task:
        """Both sets, and the rewards named.

        Raises:
            EstuneError: no reward is named, or cannot be had, or data is missing, malformed or overlapping.
        """
        if not self.rewards and self.judge is None and self.program is None:
            raise EstuneError(
                "task custom: no reward; name some in task.rewards, such as path/to/file.py:function, a judge in "
                "task.judge, or a program in task.program"
            )
        functions = [in_conversation(load_reward(reward), self.show) for reward in self.rewards]
        if self.judge is not None:
            functions.append(Judge(**self.judge.model_dump()))
        weights = self.reward_weights or [1.0] * len(functions)
        accuracy = self.accuracy or (reward_name(functions[0]) if functions else None)
        if self.program is not None:
            functions, weights, accuracy = with_rollout(functions, weights, accuracy)
        train, evaluation = self.read(self._rows)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=functions,
            reward_weights=weights,
            accuracy=accuracy,
            gold=None if self.gold_column is None else self._gold,
            show=self.show,
            rollout=None if self.program is None else by_program(self.program, chat=self.chat),
        )

    def _gold(self, row: Row) -> str | None:
        """The gold column's text, which may be a number there."""
        value = row[self.gold_column or ""]
        return None if value is None or is_nan(value) else str(value)

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        require_columns(source, records, (self.prompt_column,), remedy="rename one, or name it by task.prompt_column")
        if self.gold_column is not None:
            require_columns(source, records, (self.gold_column,))
        for number, record in enumerate(records, 1):
            prompt = record.get(self.prompt_column)
            if isinstance(prompt, str) and prompt.strip():
                prompt = prompt if self.chat else self.prompt(prompt)
            elif not (isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)):
                raise EstuneError(
                    f"data {source}: row {number}: {self.prompt_column} is {prompt!r:.80}; give text or messages"
                )
            yield {**record, "prompt": prompt}

"""Preference: whatever a reward model likes. Prompts come from a file or the hub, the reward from the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row, reward_name
from estune.rewards.load import load_reward
from estune.tasks.base import Task
from estune.tasks.options import DataOptions
from estune.tasks.records import Record, require_columns


class PreferenceConfig(DataOptions):
    """Options of the preference task."""

    summary: ClassVar[str] = "what a reward model likes"
    usual_data: ClassVar[str] = "HuggingFaceH4/ultrafeedback_binarized"

    name: Literal["preference"] = Field("preference", description="the task")
    reward_model: str | None = Field(None, description="hub id or directory of a sequence classifier with one output")
    data: str | None = Field(
        "HuggingFaceH4/ultrafeedback_binarized",
        description="file, directory or hub id with a column prompt: text, or messages",
    )
    split: str = Field("train_prefs", description="split of `data`, where it has several")
    eval_split: str = Field("test_prefs", description="split of `eval_data`, where it has several")

    def build(self, seed: int) -> Task:
        """Both sets, and the reward model's score; accuracy is its mean.

        Raises:
            EstuneError: no reward model is named, or data is missing, malformed or overlapping.
        """
        if not self.reward_model:
            raise EstuneError("task preference: no reward model; give task.reward_model, a hub id or a directory")
        train, evaluation = self.read(self._rows)
        reward = load_reward(self.reward_model)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[reward],
            reward_weights=[1.0],
            accuracy=reward_name(reward),
        )

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        require_columns(source, records, ("prompt",))
        for number, record in enumerate(records, 1):
            prompt = record["prompt"]
            if isinstance(prompt, str) and prompt.strip():
                prompt = self.prompt(prompt)
            elif not (isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)):
                raise EstuneError(f"data {source}: row {number}: prompt is {prompt!r:.80}; give text or messages")
            yield {"prompt": prompt}

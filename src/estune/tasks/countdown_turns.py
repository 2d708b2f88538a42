"""Countdown in several tries: after a wrong one the model is asked to think again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from estune.grading.convention import Row
from estune.grading.rollout import FromRollout, Rollout
from estune.rewards.countdown import answer_reward, format_reward
from estune.tasks.base import Task
from estune.tasks.countdown import CountdownConfig

SOLVED = "solved"


class CountdownGame:
    """An environment, as `grading.rollout.Environment`: Countdown, where `tries` answers may be given.

    The reward is that of Countdown, 1 for a right answer and 0.1 for its format, of the last try; metrics say whether
    it was right, and in which try.
    """

    def __init__(self, tries: int = 2) -> None:
        self._left = tries
        self._tries = 0

    def reset(self, row: Row) -> str:
        """As `Environment.reset`."""
        self._row = row
        prompt: str = row["prompt"]
        return prompt

    def step(self, completion: str) -> str | Mapping[str, Any]:
        """As `Environment.step`."""
        self._tries += 1
        row = self._row
        said: dict[str, Any] = {"prompts": [row["prompt"]], "completions": [completion]}
        right = answer_reward(**said, numbers=[row["numbers"]], target=[row["target"]])[0] or 0.0
        form = format_reward(**said)[0] or 0.0
        if right or self._tries >= self._left:
            return {
                "reward": right + 0.1 * form,
                SOLVED: right,
                "first_try": right * (self._tries == 1),
            }
        return "\n<think>"


class CountdownTurnsConfig(CountdownConfig):
    """Options of Countdown in several tries."""

    summary: ClassVar[str] = "Countdown, where a wrong answer may be followed by another"

    name: Literal["countdown-turns"] = Field("countdown-turns", description="the task")  # type: ignore[assignment]
    tries: int = Field(2, ge=1, description="answers that may be given")

    def build(self, seed: int) -> Task:
        """As `CountdownConfig.build`, the rows played by `CountdownGame`."""
        train, evaluation = self.sets(seed)
        solved = FromRollout(SOLVED, share=True)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[FromRollout(), solved],
            reward_weights=[1.0, 0.0],
            accuracy=SOLVED,
            rollout=Rollout("environment", functools.partial(CountdownGame, self.tries), chat=False),
        )

"""Reward of `reasoning-gym`: its own score of an answer to one of its generated problems."""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from estune.errors import EstuneError
from estune.grading.isolation import isolated
from estune.rewards.countdown import last_answer
from estune.rewards.text import Text, as_text


# Some scores search, or run what the answer says.
@isolated(deadline=10.0)
@dataclass(frozen=True)
class GymReward:
    """The score, mostly from 0.0 to 1.0, that a generator of `reasoning-gym` gives the completion's answer.

    Args:
        generator: its name in reasoning-gym.
        options: its options, as JSON.
        tags: the answer is what stands between the last `<answer>` and `</answer>` (0.0 without them), or, if
            False, the whole.
    """

    generator: str
    options: str = "{}"
    tags: bool = True

    @property
    def __name__(self) -> str:
        return "gym_reward"

    def __call__(
        self,
        *,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        question: Sequence[str],
        answer: Sequence[str | None],
        metadata: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        """One score a completion.

        Args:
            prompts: not read.
            completions: strings, or lists of messages of which the last is graded.
            question, answer, metadata: the problems, with metadata as a Python literal.

        Raises:
            EstuneError: reasoning-gym is not installed.
        """
        rows = zip(completions, question, answer, metadata, strict=True)
        return [self._score(as_text(text), problem, gold, more) for text, problem, gold, more in rows]

    def _score(self, text: str, question: str, answer: str | None, metadata: str) -> float:
        found = last_answer(text) if self.tags else text
        if not (found or "").strip():
            return 0.0  # some generators give points for nothing
        entry = {"question": question, "answer": answer, "metadata": literal_eval(metadata)}
        problems = generator(self.generator, self.options, 0, 1)
        try:
            return float(problems.score_answer(str(found).strip(), entry))
        except (ArithmeticError, LookupError, TypeError, ValueError):
            # Some generators parse answers without care; theirs fit (preflight sees to it), so the text is to blame.
            return 0.0


@lru_cache(maxsize=64)
def generator(name: str, options: str, seed: int, size: int) -> Any:
    """A data set of `reasoning-gym`.

    Raises:
        EstuneError: it is not installed, or has no such generator, or the generator refuses the options.
    """
    gym = _reasoning_gym()
    given: Mapping[str, Any] = json.loads(options)
    try:
        return gym.create_dataset(name, **{"seed": seed, "size": size, **given})
    except (AssertionError, TypeError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise EstuneError(f"task gym:{name}: its options {options} are refused ({why}); mend task.options") from error


def generator_names() -> list[str]:
    """Names of all generators, sorted.

    Raises:
        EstuneError: reasoning-gym is not installed.
    """
    _reasoning_gym()
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise EstuneError("gym needs the package reasoning-gym: pip install 'estune[gym]'") from error
    return reasoning_gym

"""Reward of `reasoning-gym`: its own score of an answer to one of its generated problems."""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

from estune.errors import EstuneError
from estune.grading.isolation import isolated
from estune.rewards.readable import is_formula, is_literal
from estune.rewards.text import Text, as_text, last_answer

VERSION = "0.1.25"
"""The reasoning-gym whose scores have all been looked at: what each of them does with an answer."""

# Handed to `eval`, which sees the gold answer in the scorer's own variables; to sympy's `parse_expr`, which evaluates.
EVALUATED = frozenset(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"))
PARSED = frozenset(
    ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
)


# Some scores search, or compute what an answer says.
@isolated(deadline=10.0, errors_as_crashes=True)
@dataclass(frozen=True)
class GymReward:
    """The score, mostly from 0.0 to 1.0, that a generator of `reasoning-gym` gives the completion's answer.

    Args:
        generator: its name in reasoning-gym.
        options: its options, as JSON.
        tags: the answer is what the last closed `<answer>` holds (0.0 without one); if False, the whole completion.
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

    def prepare(self) -> None:
        """Import the library and make the generator, which can take seconds."""
        generator(self.generator, self.options, 0, 1)

    def _score(self, text: str, question: str, answer: str | None, metadata: str) -> float:
        found = ((last_answer(text) if self.tags else text) or "").strip()
        entry = {"question": question, "answer": answer, "metadata": literal_eval(metadata)}
        if not found:
            return 0.0  # some generators give points for nothing
        problems = generator(self.generator, self.options, 0, 1)
        try:
            if not may_be_scored(self.generator, found, entry):
                return 0.0
            score = float(problems.score_answer(found, entry))
        except MemoryError:
            raise
        except Exception:
            # Some generators parse answers without care; theirs fit (preflight sees to it), so the text is to blame.
            return 0.0
        return score if isfinite(score) else 0.0


def may_be_scored(name: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a generator's scorer may see an answer: it evaluates nothing of it, or only what is harmless.

    Args:
        name: the generator's.
        answer: without spaces around it.
        entry: the problem, with `answer` and `metadata`.
    """
    if name == "composite":  # hands everything on
        name = str(entry["metadata"].get("source_dataset"))
    gold = str(entry["answer"]).strip()
    if name in PARSED:
        return answer == gold or is_formula(answer)
    if name in EVALUATED:
        golds = entry["metadata"].get("valid_answers", ()) if name == "n_queens" else (gold,)
        return answer in golds or is_literal(answer)
    if name == "complex_arithmetic":
        return "nan" not in answer.lower()  # it gives full marks for it
    if name == "game_of_life_halting":
        return answer.lower() == gold.lower()  # it takes any text for true, and both answers too
    return True


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
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
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

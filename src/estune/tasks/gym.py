"""Problems of `reasoning-gym`, generated without end: `gym:sudoku`, `gym:countdown` and a hundred more."""

from __future__ import annotations

import atexit
import difflib
import json
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from typing import Any, ClassVar

from pydantic import Field

from estune.completion import Completion, Prompt
from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.grading.grading import Grading
from estune.grading.rollout import FromRollout, Rollout
from estune.rewards.gym import VERSION, GymReward, generator, generator_names
from estune.tasks.base import Task
from estune.tasks.options import OwnOptions, PromptOptions

PREFIX = "gym:"
INSTRUCTION = "Think first, then give the final answer, and nothing else, in <answer> </answer> tags."
AGAIN = "That is not right. Think again, and give your answer in the same form."
SCORE = "score"
SIZE = 200

# A problem is a function of its seed, of 32 bits. The lower half of them are evaluation's, the upper half training's;
# each seed of a set has SPAN of them.
SPAN = 1 << 20
SEEDS = 1 << 11
BLOCK = 500
_MOST_FAILURES = 2_000


class GymTries:
    """An environment, as `grading.rollout.Environment`: a problem, with several tries.

    The reward is the score of the last one, which is also a metric, beside that of the first. Scores are computed by a
    grader, as without tries: what takes too long, or crashes it, is worth 0.

    Args:
        reward: what scores a try.
        tries: answers that may be given.
    """

    def __init__(self, reward: GymReward, tries: int) -> None:
        self._reward = reward
        self._tries = tries
        self._scores: list[float] = []

    def reset(self, row: Row) -> Prompt:
        """As `Environment.reset`."""
        self._row = row
        prompt: Prompt = row["prompt"]
        return prompt

    def step(self, completion: str) -> str | Mapping[str, Any]:
        """As `Environment.step`."""
        grading, one_at_a_time = _grading(self._reward)
        with one_at_a_time:
            (score,) = grading.grade([self._row], [Completion(completion, [], True)]).total
        self._scores.append(score or 0.0)
        if self._scores[-1] < 1.0 and len(self._scores) < self._tries:
            return AGAIN
        return {"reward": self._scores[-1], SCORE: self._scores[-1], "first_try": self._scores[0]}


class GymConfig(PromptOptions):
    """Options of a task of reasoning-gym."""

    summary: ClassVar[str] = "a hundred generators of problems, of the library reasoning-gym"
    usual_data: ClassVar[str] = "generated"

    name: str = Field(
        PREFIX, description="the task: gym:GENERATOR", pattern=r"^gym:[a-z0-9_]+$", validate_default=False
    )
    train_size: int | None = Field(None, ge=1, le=SPAN, description="training problems; 200 if not given")
    eval_size: int | None = Field(None, ge=1, le=SPAN, description="held-out problems; 200 if not given")
    options: OwnOptions = Field(default_factory=dict, description="the generator's own, as task.options.KEY=VALUE")
    tags: bool = Field(
        True, description="the answer is what stands in <answer> tags, which the prompt asks for; false: the whole text"
    )
    instruction: str = Field(INSTRUCTION, description="what follows each question in the prompt, where tags are wanted")
    tries: int = Field(
        1, ge=1, description="answers that may be given: after one that has not full marks the model is asked again"
    )
    trust_scorers: bool = Field(
        False,
        description=f"score with a reasoning-gym other than {VERSION}, whose scorers may run what the model writes",
    )
    seed: int | None = Field(None, ge=0, description="seed of the training problems; the run's seed if not given")
    eval_seed: int = Field(0, ge=0, description="seed of the held-out problems; the same for all runs unless changed")

    @property
    def generator(self) -> str:
        """The generator's name in reasoning-gym."""
        return self.name.removeprefix(PREFIX)

    def build(self, seed: int) -> Task:
        """Both sets, no question in both, and reasoning-gym's score.

        Raises:
            EstuneError: reasoning-gym is not installed or is a version that nobody has looked at, the generator is
                unknown, or has too few distinct problems.
        """
        names = generator_names()
        if version("reasoning_gym") != VERSION and not self.trust_scorers:
            raise EstuneError(
                f"task {self.name}: the scorers of reasoning-gym {version('reasoning_gym')} may run what the model "
                f"writes; those of {VERSION} have been looked at: pip install reasoning-gym=={VERSION}, or trust them "
                "with task.trust_scorers"
            )
        if self.generator not in names:
            near = difflib.get_close_matches(self.generator, names, 1, 0.5)
            hint = f"did you mean gym:{near[0]}?" if near else f"there are {', '.join(names)}"
            raise EstuneError(f"task {self.name}: reasoning-gym has no such generator; {hint}")
        known: set[str] = set()
        evaluation = self._rows(self.eval_seed % SEEDS * SPAN, self.eval_size or SIZE, known)
        own = seed if self.seed is None else self.seed
        train = self._rows((SEEDS + own % SEEDS) * SPAN, self.train_size or SIZE, known)
        reward = GymReward(self.generator, self._options(), self.tags)
        if self.tries > 1:
            return Task(
                name=self.name,
                train=train,
                evaluation=evaluation,
                reward_funcs=[FromRollout(), FromRollout(SCORE, share=True)],
                reward_weights=[1.0, 0.0],
                accuracy=SCORE,
                rollout=Rollout("environment", partial(GymTries, reward, self.tries)),
            )
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[reward],
            reward_weights=[1.0],
            accuracy=reward.__name__,
            gold=self._gold,
        )

    def _gold(self, row: Row) -> str | None:
        answer = row["answer"]
        return None if answer is None else f"<answer>{answer}</answer>" if self.tags else str(answer)

    def _options(self) -> str:
        return json.dumps(self.options, sort_keys=True)

    def _rows(self, first_seed: int, size: int, known: set[str]) -> list[Row]:
        """Distinct problems that are not in `known`, and are added to it."""
        rows: list[Row] = []
        failures = 0
        seed = first_seed
        while len(rows) < size:
            wanted = min(size - len(rows), BLOCK)
            with _seeded(seed):
                entries = list(islice(generator(self.generator, self._options(), seed, wanted), wanted))
            seed += wanted
            for entry in entries:
                question = str(entry["question"])
                failures = failures + 1 if question in known else 0
                if not failures:
                    known.add(question)
                    rows.append(self.row(entry))
            if failures > _MOST_FAILURES or seed - first_seed >= SPAN:
                raise EstuneError(
                    f"task {self.name}: {size} problems wanted, but only {len(rows)} new ones found; ask for fewer, or "
                    "make the generator's options wider"
                )
        return rows

    def row(self, entry: dict[str, Any]) -> Row:
        """What a problem of the generator is to the task."""
        question = str(entry["question"])
        prompt = f"{question}\n\n{self.instruction}" if self.tags and self.instruction else question
        return {
            "prompt": self.prompt(prompt),
            "question": question,
            "answer": entry["answer"],
            "metadata": repr(_literal(entry["metadata"])),
        }


def _literal(value: Any) -> Any:
    """A value in types that have Python literals. JSON would lose tuples, and numbers as keys, which scores need."""
    if isinstance(value, dict):
        return {_literal(key): _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(_literal, value)
        return tuple(items) if type(value) is tuple else list(items)
    if isinstance(value, set | frozenset):
        return sorted(map(_literal, value), key=str)
    if hasattr(value, "tolist"):
        return _literal(value.tolist())
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@lru_cache
def _grading(reward: GymReward) -> tuple[Grading, threading.Lock]:
    """A grader of this process's, for as long as that lives."""
    grading = Grading([reward], processes=1)
    atexit.register(grading.close)
    return grading, threading.Lock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within this, Python's and numpy's global generators, which a few of the library's draw from, are seeded."""
    import numpy as np

    state, other = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(other)  # noqa: NPY002

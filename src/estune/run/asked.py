"""The members of a step, asked all at once, and behind them those of the next step where these may be stale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.prompts import PromptEncoder
from estune.es.strategy import Member, Strategy, member_seed
from estune.grading.convention import Row
from estune.grading.grading import Grading, Pending
from estune.journal.journal import Journal
from estune.pool.base import Evaluated, Evaluation, Pool
from estune.pool.waiting import told_while
from estune.run.graded import Graded
from estune.run.held_out import token_ids
from estune.run.make import make_sampling
from estune.run.order import StagedOrder
from estune.tasks.base import Task

T = TypeVar("T")

UNREACHED = 1 << 39
"""A step that no run reaches: its members' seeds are free for what is tried beside runs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Members of a step, from the moment on that the pool has them.

    Attributes:
        sigma: of the perturbations.
        indices: of the rows, in the training set, group after group.
        groups: what each group of members answers: rows, and their prompts as token ids.
        members: who they are, group after group, the base as the last of each where it takes part.
        updates: that a base has had which is not stale.
        evaluations: give what each group answers.
        sampling: how completions are drawn.
    """

    sigma: float
    indices: list[int]
    groups: Sequence[tuple[Sequence[dict[str, Any]], Sequence[Sequence[int]]]]
    members: Sequence[Member]
    updates: int
    evaluations: Sequence[Evaluation]
    sampling: Sampling

    @property
    def size(self) -> int:
        """Members of a group."""
        return len(self.members) // len(self.groups)

    def of_perturbed(self, of_each: Sequence[T]) -> list[T]:
        """Of what each member came to, in their order, that of those who are perturbed."""
        return [each for member, each in zip(self.members, of_each, strict=True) if member.sign]

    def of_base(self, of_each: Sequence[T]) -> list[T]:
        """And that of the base, group after group; none where it takes no part."""
        return [each for member, each in zip(self.members, of_each, strict=True) if not member.sign]

    def rows(self, member: int) -> Sequence[dict[str, Any]]:
        """The rows that a member answers, as often as it does."""
        return self.groups[member // self.size][0]

    @property
    def prompt_ids(self) -> list[Sequence[int]]:
        """All that members are asked, by one member of each group."""
        return [ids for _, prompt_ids in self.groups for ids in prompt_ids]

    def results(self) -> Iterator[tuple[int, Evaluated]]:
        """The index and the result of each member, as they finish, while others go on."""
        for group, evaluation in enumerate(self.evaluations):
            for index, done in evaluation:
                yield group * self.size + index, done

    def graded(
        self, grading: Grading, heard: Callable[[int], object]
    ) -> tuple[list[Graded], list[int], dict[str, float]]:
        """What each member comes to, how stale it was, and the seconds of each stage, all members together.

        Args:
            grading: grades a member's completions while others go on.
            heard: called with the number of members that have answered, after each.
        """
        pending: dict[int, tuple[list[Completion], Pending]] = {}
        staleness = [0] * len(self.members)
        times = {"perturb": 0.0, "generate": 0.0, "grade": 0.0}
        for index, done in self.results():
            start = time.perf_counter()
            staleness[index] = self.updates - done.updates
            pending[index] = done.completions, grading.submit(self.rows(index), done.completions)
            times["grade"] += time.perf_counter() - start
            times["perturb"] += done.perturb_time
            times["generate"] += done.generate_time
            heard(len(pending))
        start = time.perf_counter()
        completions, waiting = zip(*(pending[i] for i in range(len(self.members))), strict=True)
        grades = grading.results(waiting)
        in_order = [Graded(self.rows(i), *each) for i, each in enumerate(zip(completions, grades, strict=True))]
        times["grade"] += time.perf_counter() - start
        return in_order, staleness, times

    def close(self) -> None:
        """Drop those that are not begun, and wait for those that are."""
        for evaluation in reversed(self.evaluations):  # the last first: nobody begins with them meanwhile
            evaluation.close()


class Asking:
    """Has members evaluated by whoever is free.

    Args:
        config: the settings.
        task, encoder, order: what the rows are, how they are encoded, and which of them a step takes.
        strategy: who the members are.
        pool: evaluates them.
        journal: what has been done so far.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        encoder: PromptEncoder,
        order: StagedOrder,
        strategy: Strategy,
        pool: Pool,
        journal: Journal,
    ) -> None:
        self._config = config
        self._task = task
        self._encoder = encoder
        self._order = order
        self._strategy = strategy
        self._pool = pool
        self._journal = journal
        self._ahead: Asked | None = None

    def ask(self) -> Asked:
        """The current step's members, who may have been at work for a while."""
        asked = self._ahead or self._ask(self._strategy.step)
        self._ahead = None
        return asked

    def ask_ahead(self) -> None:
        """Let those who find no member of the current step left go on with the next step's."""
        self._ahead = self._ask(self._strategy.step + 1)

    def drop_ahead(self) -> None:
        """Forget what the next step's members have answered so far: the base is to be had by itself."""
        if self._ahead is not None:
            with told_while("waiting for members of the next step, which are dropped, to end"):
                self._ahead.close()
            self._ahead = None

    def _ask(self, step: int) -> Asked:
        strategy = self._strategy
        sigma = strategy.sigma
        members = strategy.ask(step)
        indices = self._order.rows(step, {e.step: e.metrics for e in self._journal.evaluations})
        groups = self._config.prompt_groups
        each = len(indices) // groups
        indices = indices[: each * groups]  # a small training set may not divide
        size = len(members) // groups
        sampling = make_sampling(self._config, member_seed(strategy.seed, step, 1 << 23))
        asked = []
        evaluations = []
        for group in range(groups):
            rows = [self._task.train[i] for i in indices[group * each : (group + 1) * each]]
            rows = [row for row in rows for _ in range(self._config.samples_per_prompt)]
            prompt_ids = token_ids(self._encoder, self._task, rows)
            asked.append((rows, prompt_ids))
            of_group = members[group * size : (group + 1) * size]
            evaluations.append(self._pool.evaluate(of_group, sigma, prompt_ids, sampling))
        updates = len(self._journal.inherited) + step
        return Asked(sigma, indices, asked, members, updates, evaluations, sampling)


def first_prompts(
    config: Config, task: Task, encoder: PromptEncoder, prompts: int
) -> tuple[list[Row], list[list[int]]]:
    """Rows of a run's first step, so many of them, and token ids of their prompts.

    Raises:
        EstuneError: for a prompt that cannot be completed.
    """
    chosen = StagedOrder(len(task.train), task.stages, prompts, config.seed).rows(0)
    rows = [task.train[i] for i in chosen]
    ids = token_ids(encoder, task, rows)
    encoder.check(ids, make_sampling(config))
    return rows, ids

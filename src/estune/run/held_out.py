"""Evaluation: a task's held-out set completed with the base weights, and graded as in training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from estune.completion import Completion, Pictured, Sampling
from estune.config import Config
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.convention import Row, reward_name
from estune.grading.grading import Grading
from estune.grading.level import level_of
from estune.grading.rollout import Opening
from estune.journal.identity import hash_of
from estune.pool.base import Generating
from estune.run.graded import Graded, evaluation_metrics
from estune.run.make import make_grading, make_sampling
from estune.tasks.base import Task
from estune.tasks.preflight import FULL_MARKS

T = TypeVar("T")

Compare = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], dict[str, float]]
COMPARED = 64  # completions of an evaluation that are scored by the base model too


class HeldOut:
    """A task's held-out set, encoded once.

    Args:
        task: whose held-out set it is.
        config: the settings: how many completions of each prompt, and how they are drawn.
        encoder: makes token ids of the prompts.
        grading: grades by the task's rewards; its own if None.

    Raises:
        EstuneError: for a prompt that cannot be completed.
    """

    def __init__(self, task: Task, config: Config, encoder: PromptEncoder, grading: Grading | None = None) -> None:
        self.task = task
        self._count = config.eval_samples
        telling = (function for function in task.reward_funcs if reward_name(function) in task.accuracies)
        self._of_corpus = "corpus" in map(level_of, telling)  # then no completion is right or wrong by itself
        self.grading = grading or make_grading(config, task)
        """What grades completions."""
        self.sampling = evaluation_sampling(config)
        """How completions are drawn."""
        self.prompt_ids = encode_rows(encoder, task, dict(enumerate(task.evaluation)), "evaluation row", self.sampling)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        return max(map(len, self.prompt_ids), default=0)

    @property
    def asked(self) -> list[list[int]]:
        """What is generated from: each prompt as often as it gets a completion that can be another."""
        return self._each(self.prompt_ids) if self.sampling.temperature else self.prompt_ids

    def evaluate(self, generator: Generating, *, compare: Compare | None = None) -> tuple[dict[str, float], Graded]:
        """Metrics with `eval_` before them, and what they are made of: each prompt's completions, one after another.

        Args:
            generator: whose weights are evaluated.
            compare: `Pool.compare`, to tell how far they have come from the base model.

        Raises:
            EstuneError: where the reward cannot be told.
        """
        return self.judge(generator.generate(self.asked, self.sampling), compare=compare)

    def judge(
        self, completions: list[Completion], *, compare: Compare | None = None
    ) -> tuple[dict[str, float], Graded]:
        """As `evaluate`, of completions of all that is asked, however they were generated."""
        rows = self._each(self.task.evaluation)
        prompt_ids = self._each(self.prompt_ids)
        if not self.sampling.temperature:  # all of a prompt would be alike
            completions = self._each(completions)
        graded = Graded(rows, completions, self.grading.grade(rows, completions))
        metrics = evaluation_metrics(self.task, graded)
        if self._count > 1 and not self._of_corpus:
            metrics |= pass_metrics(solved(self.task, graded), self._count)
        if compare is not None:
            chosen = range(0, len(rows), max(1, len(rows) // COMPARED))
            first = [_first_answer(prompt_ids[i], completions[i]) for i in chosen]
            ids = [prompt for prompt, answer in first if answer], [answer for _, answer in first if answer]
            metrics |= {f"eval_{key}": value for key, value in compare(*ids).items()}
        return metrics, graded

    def _each(self, items: Sequence[T]) -> list[T]:
        """Each item as often as there are completions of a prompt, one after another."""
        return [item for item in items for _ in range(self._count)]

    def close(self) -> None:
        """End what grades."""
        self.grading.close()


def refuse_unreachable(task: Task, config: Config) -> None:
    """Refuse rollouts that the processes of these settings could not play; see `Rollout.refuse_unreachable`."""
    if task.rollout is not None and ((config.replicas or 1) > 1 or config.workers):
        task.rollout.refuse_unreachable()


def _first_answer(prompt_ids: Sequence[int], completion: Completion) -> tuple[Sequence[int], Sequence[int]]:
    """Token ids of a prompt and its completion; of a rollout's first turn, as others stand in between its answers."""
    return (prompt_ids, completion.token_ids) if completion.played is None else completion.played.first


def encode_rows(
    encoder: PromptEncoder, task: Task, rows: Mapping[int, Row], what: str, sampling: Sampling
) -> list[list[int]]:
    """Token ids of prompts of a task's rows; `what` is what a row is called where its prompt cannot be completed.

    Raises:
        EstuneError: naming the row.
    """
    try:
        ids = token_ids(encoder, task, rows.values())
        encoder.check(ids, sampling)
        return ids
    except EstuneError:
        for number, row in rows.items():
            try:
                encoder.check(token_ids(encoder, task, [row]), sampling)
            except EstuneError as error:
                raise EstuneError(f"{what} {number}: {str(error).removeprefix('prompt 0: ')}") from error
        raise


def token_ids(encoder: PromptEncoder, task: Task, rows: Iterable[Row]) -> list[list[int]]:
    """Token ids of what the model is shown for each row, and what plays it from there on."""
    rows = list(rows)
    ids = encoder.encode([task.shown(row, template=encoder.has_template) for row in rows])
    if task.rollout is None:
        return ids
    if any(isinstance(of, Pictured) for of in ids):
        raise EstuneError("prompt 0: rollouts are played in text alone; leave pictures out")
    return [Opening(opening, task.rollout, row) for opening, row in zip(ids, rows, strict=True)]


def hash_of_prompts(*prompts: Sequence[Sequence[int]]) -> str:
    """32 hexadecimal digits of BLAKE2b over token ids: what the model is shown, whatever made it of the data."""
    seen = [[of.pictures for of in some if isinstance(of, Pictured)] for some in prompts]
    return hash_of(json.dumps([*prompts, seen] if any(seen) else prompts).encode())


def evaluation_sampling(config: Config) -> Sampling:
    """How the completions of an evaluation are drawn."""
    sampling = make_sampling(config)
    return sampling if config.eval_temperature is None else replace(sampling, temperature=config.eval_temperature)


def solved(task: Task, graded: Graded) -> list[bool]:
    """For each completion, whether the reward that tells accuracy gives full marks."""
    scores = [graded.grades.scores[name] for name in task.accuracies]
    values = [next((s for s in of_row if s is not None), 0.0) for of_row in zip(*scores, strict=True)]
    return [value >= FULL_MARKS for value in values]


def pass_metrics(correct: Sequence[bool], count: int) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ... up to `count`, and mean@count, of `count` completions a prompt.

    pass@k is the unbiased estimate 1 - C(n - c, k) / C(n, k), where c of n completions are correct (Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code", equation 1).
    """
    right = [sum(correct[i : i + count]) for i in range(0, len(correct), count)]
    found = {f"eval_mean@{count}": sum(right) / len(correct)}
    k = 1
    while k <= count:
        missed = [math.comb(count - c, k) / math.comb(count, k) for c in right]
        found[f"eval_pass@{k}"] = 1 - math.fsum(missed) / len(missed)
        k *= 2
    return found

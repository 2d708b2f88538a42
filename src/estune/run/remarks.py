"""What a run says unasked, once and in one line: that it does other than was asked for, or that nothing comes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from estune.charts.words import amount
from estune.completion import Prompt
from estune.config import Config
from estune.es.strategy import alike
from estune.grading.convention import copied
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, StepRecord
from estune.run.held_out import evaluation_sampling
from estune.run.order import StagedOrder
from estune.tasks.base import Task

log = logging.getLogger(__name__)

ALIKE_STEPS = 3
EVALUATIONS = 3
FAR = 4.0  # times as long, or as short, as completions were in the first step
DULL = 0.25  # of the first step's share of different completions
FAR_KL = 1.0  # nats a token


def log_before(config: Config, task: Task, order: StagedOrder) -> None:
    """Log what is to be said of settings and data before a run begins."""
    for remark in before(config, task, order):
        log.warning("%s", remark)


def before(config: Config, task: Task, order: StagedOrder) -> Iterator[str]:
    """What is to be said of settings and data before a run begins."""
    fewest = min(each.size for each in order.orders)
    if fewest < config.prompts_of_step:
        times = " * prompt_groups" if config.prompt_groups > 1 else ""
        where = "a stage" if len(order.orders) > 1 else "the training set"
        asked = f"prompts_per_step{times} is {config.prompts_of_step}"
        yield f"{asked}, and {where} has {amount(fewest, 'rows')}: every step uses all of them"
    answered = sum(_goes_on(row["prompt"]) for row in task.train)
    if answered:
        yield (
            f"task {task.name}: {answered} of {len(task.train)} training prompts end with words of the assistant's, "
            "which the model goes on from: where these are the answer, leave them out of the prompt"
        )
    yield from _shared(task)
    if task.evaluation:
        yield from of_evaluation(config)
    if config.back_to_best is not None:
        yield from _never_back(config, task)


def _never_back(config: Config, task: Task) -> Iterator[str]:
    """Of `back_to_best`, where no evaluation before the last step has an earlier one to be compared with."""
    if not task.evaluation:
        yield f"back_to_best looks at evaluations, and task {task.name} has no held-out rows: it will do nothing"
        return
    on_the_way = (config.steps - config.steps_in_one) // config.eval_steps
    if on_the_way < 1 + (not config.eval_on_start):
        yield (
            f"back_to_best looks at evaluations before the last step, of which steps {config.steps} and eval_steps "
            f"{config.eval_steps} make none that could be worse than an earlier one: lower eval_steps"
        )


def _goes_on(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and prompt[-1].get("role") == "assistant"


def _shared(task: Task) -> Iterator[str]:
    """Of columns whose values cannot be copied for each call of a reward."""
    for column in task.train[0]:
        uncopied: list[Any] = []
        for row in (*task.train, *task.evaluation):
            copied(row.get(column), uncopied)
            if uncopied:
                yield (
                    f"task {task.name}: column {column} has {uncopied[0]!r:.60}, which cannot be copied: what a reward "
                    "changes in it, the next call sees; leave it as it is there, or keep it out of the data"
                )
                break


def of_evaluation(config: Config) -> Iterator[str]:
    """What is to be said of how completions of an evaluation are drawn."""
    if config.eval_samples > 1 and not evaluation_sampling(config).temperature:
        yield (
            f"{config.eval_samples} completions of each held-out prompt are asked for, and greedy ones are all alike: "
            "one is generated; eval_temperature=0.8 draws different ones"
        )


def collapse(steps: Sequence[StepRecord], evaluations: Sequence[EvaluationRecord]) -> dict[str, str]:
    """What is to be said, by kind, of a run that has collapsed; `steps` and `evaluations` are all so far.

    What the run has gone back from is no part of where it is.
    """
    undone = {i for evaluation in evaluations for i in evaluation.undone}
    kept = [step for step in steps if step.step not in undone]
    here = evaluations[-1] if evaluations and evaluations[-1].back is None else None
    found = {
        "members": members_alike(kept),
        "completions": collapsing(kept) if kept else None,
        "distance": far_from_base(here) if here else None,
    }
    return {kind: remark for kind, remark in found.items() if remark is not None}


class Remarks:
    """What is said while a run goes on, once of each kind."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, kind: str, remark: str | None) -> None:
        """Log a remark, if there is one, and none of its kind was made before."""
        if remark is not None and kind not in self._said:
            self._said.add(kind)
            log.warning("%s", remark)

    def has_collapsed(self, journal: Journal) -> bool:
        """Whether a run has collapsed, of which each sign is said."""
        found = collapse(journal.steps, journal.evaluations)
        for kind, remark in found.items():
            self.say(kind, remark)
        return bool(found)


def members_alike(steps: Sequence[StepRecord]) -> str | None:
    """What is to be said where no member of the last steps did better than another; `steps` are all so far."""
    last = steps[-ALIKE_STEPS:]
    found = [[reward for reward in step.of_members if reward is not None] for step in last]
    if len(last) < ALIKE_STEPS or not all(rewards and alike(rewards) for rewards in found):
        return None
    return (
        f"step {last[-1].step + 1}: all members have had one reward ({max(found[-1]):.4g} in this step) for "
        f"{ALIKE_STEPS} steps, and nothing is learned from that: `estune probe` looks for a sigma at which they "
        "differ; a reward that gives part of the marks for part of the work helps, too"
    )


def collapsing(steps: Sequence[StepRecord]) -> str | None:
    """What is to be said where completions have become others altogether; `steps` are all so far.

    A reward can be earned by what nobody meant, and this is what that looks like.
    """
    now = steps[-1].metrics
    then = steps[0].metrics
    if not then.keys() >= {"completions/mean_length", "completions/distinct"}:
        return None  # of a journal that was put together from others
    found = []
    length = now["completions/mean_length"]
    first = then["completions/mean_length"]
    if not first / FAR <= length <= first * FAR:
        found.append(f"take {length:.1f} tokens, {first:.1f} in the first step")
    distinct = now["completions/distinct"]
    varied = then["completions/distinct"]
    if distinct < DULL * varied:
        found.append(f"are hardly different any more ({distinct:.0%}, {varied:.0%} in the first step)")
    if not found:
        return None
    return (
        f"step {steps[-1].step + 1}: completions {' and '.join(found)}: read some, in completions/. If that is not "
        "what the reward is for, mend it, or set constraint, anchor_decay or guard"
    )


def far_from_base(evaluation: EvaluationRecord) -> str | None:
    """What is to be said where the model hardly says any more what the base model would."""
    kl = evaluation.metrics.get("eval_kl", 0.0)
    if kl <= FAR_KL:
        return None
    return (
        f"step {evaluation.step}: the model has come {kl:.2g} nats a token from the base model, which may have cost it "
        "what it is not trained for: watch shows that; a smaller learning rate or anchor_decay keeps it closer"
    )


def never_right(task: Task, evaluations: Sequence[EvaluationRecord], *, over: bool) -> str | None:
    """What is to be said where nothing was ever right.

    Args:
        task: whose evaluations they are.
        evaluations: all so far.
        over: there will be no more.
    """
    if len(evaluations) < (2 if over else EVALUATIONS) or any(e.metrics["eval_accuracy"] != 0 for e in evaluations):
        return None
    last = evaluations[-1]
    cut = last.metrics.get("eval_completions/clipped_ratio", 0.0)
    return (
        f"step {last.step}: {' and '.join(task.accuracies)} has been 0 at all {len(evaluations)} evaluations "
        f"({cut:.0%} of completions cut off at max_new_tokens in this one): read what the model answers in "
        f"completions/evaluation-{last.step:05d}.parquet"
    )

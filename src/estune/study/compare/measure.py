"""How good a checkpoint is, and how far from the model it came from: one code for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.score import divergence
from estune.engines.tokenizer import open_encoder
from estune.engines.transformers import TransformersEngine
from estune.run.graded import Graded, evaluation_metrics, grade_completions
from estune.run.held_out import token_ids
from estune.run.make import make_grading, make_sampling
from estune.tasks.base import Task

# Seed of the completions over which the divergence is taken: the same for all methods.
DIVERGENCE_SEED = 20250924


def measure(checkpoint: Path, base: Path, config: Config, task: Task, short_tokens: int | None) -> dict[str, float]:
    """The figures of a checkpoint that are compared, on the evaluation set.

    Args:
        checkpoint: the trained model.
        base: the model that it was trained from.
        config: the settings, of which the engine's and the longest completion are used.
        task: evaluation set and rewards.
        short_tokens: an answer of at most so many tokens is short; by default, half of the base's mean length.

    Returns:
        base_accuracy, that of the base; share, whether accuracies are shown in percent; accuracy, reward, length (mean,
        in tokens) and clipped (share) of greedy completions; short_but_wrong, the share of them that are short without
        being right, by which a reward for brevity can be won; and kl.

        kl is the divergence of the trained from the base model in nats a token, over one completion a prompt that the
        trained model draws at temperature 1: the mean of r - 1 - log r with r = p_base / p_trained (Schulman's k3).
        Each term is above 0 and, as tokens are the trained model's own, the mean is unbiased.
    """
    greedy = make_sampling(config.model_copy(update={"temperature": 0.0}))
    before = _engine(base, config)
    ids = token_ids(open_encoder(config), task, task.evaluation)
    answers = before.generate(ids, greedy)
    if short_tokens is None:
        short_tokens = round(mean_length(answers) / 2)
    after = _engine(checkpoint, config)
    with make_grading(config, task) as grading:
        base_metrics = evaluation_metrics(task, grade_completions(task, task.evaluation, answers, grading))
        graded = grade_completions(task, task.evaluation, after.generate(ids, greedy), grading)
    metrics = evaluation_metrics(task, graded)
    drawn = [
        c.token_ids for c in after.generate(ids, Sampling(config.max_new_tokens, temperature=1.0, seed=DIVERGENCE_SEED))
    ]
    return {
        "base_accuracy": base_metrics["eval_accuracy"],
        "accuracy": metrics["eval_accuracy"],
        "share": task.accuracy_is_share,
        "reward": metrics["eval_reward"],
        "length": metrics["eval_completions/mean_length"],
        "clipped": metrics["eval_completions/clipped_ratio"],
        "short_tokens": short_tokens,
        "short_but_wrong": short_but_wrong(task, graded, short_tokens),
        "kl": divergence(after.score(ids, drawn), before.score(ids, drawn)),
    }


def greedy(checkpoint: Path, config: Config, task: Task) -> dict[str, float]:
    """Accuracy and reward of greedy completions on the evaluation set: one point of a learning curve."""
    sampling = make_sampling(config.model_copy(update={"temperature": 0.0}))
    ids = token_ids(open_encoder(config), task, task.evaluation)
    answers = _engine(checkpoint, config).generate(ids, sampling)
    with make_grading(config, task) as grading:
        metrics = evaluation_metrics(task, grade_completions(task, task.evaluation, answers, grading))
    return {"accuracy": metrics["eval_accuracy"], "reward": metrics["eval_reward"]}


def short_but_wrong(task: Task, graded: Graded, short_tokens: int) -> float:
    """Share of all completions that have at most `short_tokens` tokens and are not fully right."""
    found = 0
    for i, completion in enumerate(graded.completions):
        scores = {name: [graded.grades.scores[name][i]] for name in task.accuracies}
        right = task.accuracy_of([graded.rows[i]], scores).get("", 0.0) >= 1.0
        found += len(completion.token_ids) <= short_tokens and not right
    return found / len(graded.completions)


def mean_length(completions: Sequence[Completion]) -> float:
    """Mean tokens of a completion, end tokens included."""
    return sum(len(c.token_ids) for c in completions) / len(completions)


def _engine(path: Path, config: Config) -> TransformersEngine:
    return TransformersEngine(
        path,
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        trust_remote_code=config.trust_remote_code,
    )

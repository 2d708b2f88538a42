"""From completions to metrics, the same way in training, evaluation and `estune eval`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.completion import Completion, content_text
from estune.errors import ACCEPT, EstuneError
from estune.es.strategy import mean_and_std
from estune.files import replacing
from estune.grading.convention import Grades, Row
from estune.grading.grading import Grading, grade
from estune.run.monitors.base import Sample
from estune.tasks.base import Task


@dataclass(frozen=True)
class Graded:
    """Completions of one set of weights with their grades."""

    rows: Sequence[Row]
    completions: list[Completion]
    grades: Grades

    @property
    def tokens(self) -> int:
        """Tokens generated, end tokens included."""
        return sum(len(c.token_ids) for c in self.completions)

    @property
    def kl(self) -> float | None:
        """Divergence from the base model in nats a token, over all tokens; None if not asked for, or not finite."""
        known = [(c.kl, len(c.token_ids)) for c in self.completions if c.kl is not None and c.token_ids]
        if not known or not all(math.isfinite(kl) for kl, _ in known):
            return None
        return math.fsum(kl * tokens for kl, tokens in known) / sum(tokens for _, tokens in known)

    def metrics(self) -> dict[str, float]:
        """Reward (if there is one), each function's mean, and the shape of the completions, under TRL's names.

        Then what functions logged and counted, and how many completions a function could not grade, as
        `rewards/NAME/timeouts` and so on: always for isolated functions, for others where one failed.
        """
        count = len(self.completions)
        mean = self.grades.mean
        kl = self.kl
        return {
            **({} if mean is None else {"reward": mean}),
            **{f"rewards/{name}/mean": value for name, value in self.grades.means().items()},
            **self.counts(),
            **self.grades.logged_means(),
            "completions/mean_length": self.tokens / count,
            "completions/clipped_ratio": sum(not c.finished for c in self.completions) / count,
            "completions/distinct": len({c.text for c in self.completions}) / count,
            **({} if kl is None else {"kl": kl}),
        }

    def counts(self) -> dict[str, float]:
        """Of the metrics those that are summed over members: failures, and what functions counted."""
        return {
            f"rewards/{name}/{kind}": number
            for counted in (self.grades.failures, self.grades.counts)
            for name, numbers in counted.items()
            for kind, number in numbers.items()
        }

    def sample(self, index: int = 0) -> Sample:
        """One row to show."""
        row = self.rows[index]
        return Sample(prompt_text(row["prompt"]), self.completions[index].text, self.grades.total[index])

    def records(self, **more: Any) -> list[dict[str, Any]]:
        """One record a row, for a table on disk."""
        return [
            {
                **more,
                "prompt": prompt_text(row["prompt"]),
                "completion": completion.text,
                "reward": self.grades.total[i],
                **{f"rewards/{name}": scores[i] for name, scores in self.grades.scores.items()},
                "tokens": len(completion.token_ids),
                "finished": completion.finished,
                **{column: values[i] for column, values in self.grades.extras.items()},
            }
            for i, (row, completion) in enumerate(zip(self.rows, self.completions, strict=True))
        ]


def grade_completions(
    task: Task, rows: Sequence[Row], completions: list[Completion], grading: Grading | None = None
) -> Graded:
    """Grade completions of `rows` by the task's rewards, and by the run's `grading` where there is one."""
    if grading is not None:
        return Graded(rows, completions, grading.grade(rows, completions))
    return Graded(rows, completions, grade(task.reward_funcs, task.reward_weights, rows, completions))


def evaluation_metrics(task: Task, graded: Graded) -> dict[str, float]:
    """Metrics of an evaluation: those of a batch with `eval_` before them, and `eval_accuracy`, also by group.

    Raises:
        EstuneError: where a reward is not finite, or none applies: nothing could be compared with it.
    """
    metrics = {f"eval_{key}": value for key, value in graded.metrics().items()}
    accuracy = task.accuracy_of(graded.rows, graded.grades.scores)
    if "" not in accuracy or "eval_reward" not in metrics:
        raise EstuneError(
            f"task {task.name}: on the evaluation set the reward is not finite, or {' and '.join(task.accuracies)} "
            f"applies to no row; mend the reward, then resume with {ACCEPT}"
        )
    return metrics | {f"eval_accuracy/{group}" if group else "eval_accuracy": a for group, a in accuracy.items()}


def step_metrics(members: Sequence[Graded]) -> dict[str, float]:
    """Metrics of a step over its members: reward and spread, counts added up, and the mean of all else."""
    each = [graded.metrics() for graded in members]
    rewards = [metrics["reward"] for metrics in each if "reward" in metrics]
    counts = {key for graded in members for key in graded.counts()}
    mean, std = mean_and_std(rewards)
    columns = {
        key: [metrics[key] for metrics in each if key in metrics]
        for key in dict.fromkeys(key for metrics in each for key in metrics)
        if key != "reward"
    }
    return {
        "reward": mean,
        "reward_std": std,
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        **{key: sum(v) if key in counts else mean_and_std(v)[0] for key, v in columns.items()},
        "failed_members": len(members) - len(rewards),
    }


def write_completions(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as parquet; a column whose values are not all of one type that it can hold becomes text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: _column([record.get(name) for record in records]) for name in names}
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _column(values: list[Any]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pa.array(values)
        if pa.types.is_nested(found.type):  # which may hold types that cannot be written
            pq.write_table(pa.table({"": found}), pa.BufferOutputStream())
    except (pa.ArrowException, OverflowError, UnicodeError):
        texts = [None if value is None else str(value) for value in values]
        return pa.array([text if text is None else text.encode(errors="replace").decode() for text in texts])
    return found


def prompt_text(prompt: Any) -> str:
    """A prompt as text: messages one under the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {content_text(message['content'])}" for message in prompt)

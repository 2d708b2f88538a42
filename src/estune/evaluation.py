"""From completions to metrics, the same way in training, evaluation and `estune eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.engines.base import Completion
from estune.errors import EstuneError
from estune.files import replacing
from estune.monitors.base import Sample
from estune.rewards.grade import Grades, Row, grade
from estune.strategy import mean_and_std
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

    def metrics(self) -> dict[str, float]:
        """Reward (if there is one), each function's mean, and the shape of the completions, under TRL's names."""
        count = len(self.completions)
        mean = self.grades.mean
        return {
            **({} if mean is None else {"reward": mean}),
            **{f"rewards/{name}/mean": value for name, value in self.grades.means().items()},
            "completions/mean_length": self.tokens / count,
            "completions/clipped_ratio": sum(not c.finished for c in self.completions) / count,
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
            }
            for i, (row, completion) in enumerate(zip(self.rows, self.completions, strict=True))
        ]


def grade_completions(task: Task, rows: Sequence[Row], completions: list[Completion]) -> Graded:
    """Grade completions of `rows` by the task's rewards."""
    return Graded(rows, completions, grade(task.reward_funcs, task.reward_weights, rows, completions))


def evaluation_metrics(task: Task, graded: Graded) -> dict[str, float]:
    """Metrics of an evaluation: those of a batch with `eval_` before them, and `eval_accuracy`.

    Raises:
        EstuneError: where a reward is not finite, or none applies: nothing could be compared with it.
    """
    metrics = {f"eval_{key}": value for key, value in graded.metrics().items()}
    accuracy = metrics.get(f"eval_rewards/{task.accuracy}/mean")
    if accuracy is None or "eval_reward" not in metrics:
        raise EstuneError(
            f"task {task.name}: on the evaluation set the reward is not finite, or {task.accuracy} applies to no row; "
            "mend the reward and resume"
        )
    return metrics | {"eval_accuracy": accuracy}


def step_metrics(members: Sequence[Graded]) -> dict[str, float]:
    """Metrics of a step over its members: reward and spread, and the mean of all else over those that have it."""
    each = [graded.metrics() for graded in members]
    rewards = [metrics["reward"] for metrics in each if "reward" in metrics]
    mean, std = mean_and_std(rewards)
    averages = {
        key: mean_and_std([metrics[key] for metrics in each if key in metrics])[0]
        for key in dict.fromkeys(key for metrics in each for key in metrics)
        if key != "reward"
    }
    return {
        "reward": mean,
        "reward_std": std,
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        **averages,
        "failed_members": len(members) - len(rewards),
    }


def write_completions(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(records), temporary)


def prompt_text(prompt: Any) -> str:
    """A prompt as text: messages one under the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)

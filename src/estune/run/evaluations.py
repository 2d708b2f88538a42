"""What is evaluated: the held-out set of a task, and those of the tasks that are watched beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir
from pathlib import Path

from estune.config import Config
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.pool.base import Generating
from estune.run.directory import RunDirectory
from estune.run.graded import Graded, write_completions
from estune.run.held_out import Compare, HeldOut
from estune.tasks.base import Task


class Evaluations:
    """Held-out sets, encoded once.

    Args:
        task: the run's own.
        config: the settings; `watch` names the other tasks.
        encoder: makes token ids of the prompts.
        folder: from which files of watched tasks are named.
        grading: grades by the rewards of the run's own task; what does, if None, ends with this.

    Raises:
        EstuneError: for a prompt that cannot be completed, or if there is something to watch and a set is empty.
    """

    def __init__(
        self, task: Task, config: Config, encoder: PromptEncoder, folder: Path, grading: Grading | None = None
    ) -> None:
        self.own = HeldOut(task, config, encoder, grading)
        """That of the run's own task."""
        self.watched: dict[str, HeldOut] = {}
        """Those of the tasks that are watched, by name."""
        with ExitStack() as opened:
            if grading is None:
                opened.callback(self.own.close)
            for options in config.watch:
                with chdir(folder):
                    other = options.build(config.seed)
                empty = next((t.name for t in (task, other) if not t.evaluation), None)
                if empty is not None:
                    raise EstuneError(f"watch: task {empty} has no evaluation set; give it one, or leave out watch")
                self.watched[other.name] = HeldOut(other, config, encoder)
                opened.callback(self.watched[other.name].close)
            self._opened = opened.pop_all()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        return max(held_out.longest for _, held_out in self)

    def __iter__(self) -> Iterator[tuple[str, HeldOut]]:
        """The run's own, which comes first and has no name here, and the others with their tasks' names."""
        yield "", self.own
        yield from self.watched.items()

    @property
    def accuracies(self) -> dict[str, Task]:
        """The names of accuracies among the metrics, and whose each is."""
        watched = {f"watch/{name}/accuracy": each.task for name, each in self.watched.items()}
        return {"eval_accuracy": self.own.task} | watched

    def evaluate(
        self,
        generator: Generating,
        step: int,
        run: RunDirectory,
        begin: Callable[[str, Sequence[Sequence[int]]], object],
        *,
        compare: Compare | None = None,
    ) -> tuple[dict[str, float], Graded]:
        """Metrics of all sets, and what those of the run's own are made of. Completions of the others go to its files.

        Args:
            generator: whose weights are evaluated.
            step: number of steps taken.
            run: the run's directory.
            begin: called with the name and the prompts of each set before it is generated.
            compare: as `HeldOut.evaluate` takes it.

        Raises:
            EstuneError: where a reward cannot be told.
        """
        begin("evaluation", self.own.asked)
        found, graded = self.own.evaluate(generator, compare=compare)
        metrics = {"step": step, **found}
        for name, watched in self.watched.items():
            begin(name, watched.asked)
            found, completed = watched.evaluate(generator)
            metrics |= named(name, found)
            file = re.sub(r"[^\w.-]", "-", name)
            write_completions(run.completions(f"watch-{file}-{step:05d}"), completed.records(step=step))
        return metrics, graded

    def close(self) -> None:
        """End what grades."""
        self._opened.close()


def named(task: str, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Metrics of a held-out set as they stand beside others': a watched task's under its name, the run's own as is."""
    return {f"watch/{task}/{key.removeprefix('eval_')}": value for key, value in metrics.items()} if task else metrics

"""One step: ask, grade each member while the next generates, tell, apply, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from estune.errors import ACCEPT, EstuneError
from estune.es.strategy import Update
from estune.grading.grading import Grading
from estune.journal.records import StepRecord
from estune.run.asked import Answered, Asking
from estune.run.due import checkpoint_is_due, evaluation_is_due
from estune.run.graded import step_metrics, write_completions
from estune.run.guard import Look
from estune.run.monitors.listeners import Listeners
from estune.run.standing import Standing
from estune.tasks.base import Task

log = logging.getLogger(__name__)


class Stepping:
    """Takes a run's steps.

    Args:
        task: what is trained on.
        standing: where the run stands.
        asking: asks the members.
        grading: grades what they answer.
        listeners: are told of each step.
    """

    def __init__(self, task: Task, standing: Standing, asking: Asking, grading: Grading, listeners: Listeners) -> None:
        self._task = task
        self._standing = standing
        self._asking = asking
        self._grading = grading
        self._listeners = listeners

    def take(self) -> None:
        """Take the next step; when this returns it is in the journal, and monitors know.

        Raises:
            EstuneError: no member has a reward.
        """
        began = time.perf_counter()
        standing = self._standing
        step = standing.step + 1
        rate = standing.strategy.learning_rate
        answered = self._answered(step)
        rewards = answered.rewards
        fitness = standing.judge.fitness(answered.graded)
        if all(r is None for r in rewards):
            raise EstuneError(
                f"step {step}: no member has a reward, see the warnings; mend the reward, then resume with {ACCEPT}"
            )
        metrics = self._metrics(step, answered)
        start = time.perf_counter()
        update, fingerprint, look = self._update(answered, fitness)
        times = answered.times | {"update": time.perf_counter() - start}
        if look is not None:
            metrics |= look.metrics(taken_back=not any(update.coefficients))
            metrics["num_tokens"] += look.tokens
        if standing.config.sam_rho:
            metrics["displaced"] = float(standing.strategy.displaced)
        metrics["learning_rate"] = rate
        metrics |= self._speed(answered, time.perf_counter() - began)
        metrics |= {f"time/{key}": seconds for key, seconds in times.items()}
        self._keep_completions(step, answered)
        record = StepRecord(
            update,
            rate,
            rewards,
            answered.asked.indices,
            fingerprint,
            metrics,
            answered.staleness,
            [] if fitness == rewards else fitness,
            standing.state(),
        )
        standing.journal.append_step(record)
        self._grading.state.global_step = step
        self._grading.state.epoch = step * len(record.prompts) / len(self._task.train)
        self._listeners.tell(lambda m: m.on_step_end(metrics, answered.graded[0].sample()))

    def _answered(self, step: int) -> Answered:
        """What the members came to; where members may be stale, those of the next step are asked, too."""
        config = self._standing.config
        asked = self._asking.ask()
        members = len(asked.members)
        self._listeners.tell_work("members", asked.prompt_ids, members, asked.size)
        pauses = evaluation_is_due(config, step) or checkpoint_is_due(config, step)  # all are to be at their end then
        if config.max_staleness and not pauses:
            self._asking.ask_ahead()
        return asked.graded(self._grading, lambda done: self._listeners.tell(lambda m: m.on_member_end(done, members)))

    def _update(self, answered: Answered, fitness: Sequence[float | None]) -> tuple[Update, str, Look | None]:
        """Change the weights, and back if that harms them: the update, the fingerprint, and what was looked at."""
        standing = self._standing
        update, fingerprint = standing.update(fitness, answered.asked.sigma)
        guard = standing.config.guard
        before = answered.base_reward
        if guard is None or before is None or not any(update.coefficients):
            return update, fingerprint, None
        look = Look.at(answered, before, standing.pool, self._grading)
        if not look.harmed(guard):
            return update, fingerprint, look
        log.warning("step %d: %s: taken back", update.step + 1, look)
        return *standing.take_back(update), look

    def _metrics(self, step: int, answered: Answered) -> dict[str, float]:
        """What members came to, before the weights change."""
        metrics = {"step": step, **step_metrics(answered.perturbed), "sigma": answered.asked.sigma}
        if (reward := answered.base_reward) is not None:
            metrics["reward_base"] = reward
        if (drift := self._standing.pool.drift()) is not None:
            metrics |= {"weights/drift_changed": drift.changed, "weights/drift_rms": drift.rms}
        steps = self._standing.journal.steps
        before = steps[-1].metrics.get("num_tokens", 0) if steps else 0
        return metrics | {"num_tokens": before + answered.tokens}

    def _speed(self, answered: Answered, seconds: float) -> dict[str, float]:
        """Metrics of what a step came to in this time."""
        metrics = {"step_time": seconds, "tokens_per_second": answered.tokens / seconds}
        if self._standing.config.max_staleness:
            metrics["staleness"] = sum(answered.staleness) / len(answered.staleness)
        return metrics

    def _keep_completions(self, step: int, answered: Answered) -> None:
        """Write a table of completions, before the journal says that the step is done: one cut off is taken again."""
        kept = answered.graded[: self._standing.config.log_completions]
        if kept:
            records = [r for member, graded in enumerate(kept) for r in graded.records(step=step, member=member)]
            write_completions(self._standing.run.completions(f"step-{step:05d}"), records)

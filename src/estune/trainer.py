"""The loop: ask, evaluate the members, grade each while the next generates, tell, apply, record."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from estune.checkpoint import Checkpoint
from estune.config import Config, parse
from estune.data import RowOrder
from estune.errors import EstuneError
from estune.evaluation import Graded, evaluation_metrics, grade_completions, write_completions
from estune.journal import EvaluationRecord, Header, Journal, StepRecord
from estune.monitors import default_monitors
from estune.monitors.base import Monitor, Plan, Summary
from estune.run import RunDirectory, packages
from estune.setup import load_model, make_sampling, make_strategy
from estune.strategy import mean_and_std, member_seed
from estune.tasks.base import Task

log = logging.getLogger(__name__)


class Trainer:
    """Fine-tunes a model on a task.

    Args:
        config: the settings.
        task: a task of your own; by default the one the settings name.
        monitors: who is told what happens; by default the console and the files of the run.

    Raises:
        EstuneError: for settings, data or a model that cannot be trained with, before anything is written.
    """

    def __init__(self, config: Config, *, task: Task | None = None, monitors: Sequence[Monitor] | None = None) -> None:
        self._open(config, task)
        run = RunDirectory.create(config)
        weights = self.weights
        header = Header(
            model=config.model,
            base_hash=self.checkpoint.content_hash(),
            policy=config.weights,
            rounding=config.rounding,
            noise=config.noise,
            dtype=weights.dtype,
            live_dtype=str(self.engine.model.dtype).removeprefix("torch."),
            tensors={p.name: list(p.aliases) for p in weights.parameters},
            fingerprint=weights.fingerprint(),
            data_hash=self.task.data_hash(),
            config=config.model_dump(mode="json"),
            packages=packages(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._start(run, Journal.create(run.path, header), monitors)

    @classmethod
    def resume(
        cls,
        run: str | Path,
        *,
        steps: int | None = None,
        task: Task | None = None,
        monitors: Sequence[Monitor] | None = None,
    ) -> Trainer:
        """Go on with a run where its journal ends, to the same bits an undisturbed run would have.

        Args:
            run: the run's directory.
            steps: a new total, to make a finished run longer.
            task, monitors: as for a new run.

        Raises:
            EstuneError: where journal, base model or data are not what the run began with.
        """
        journal = Journal.resume(Path(run))
        header = journal.header
        self = cls.__new__(cls)
        try:
            if steps not in (None, journal.settings["steps"]):
                journal.append_settings({"steps": steps})
            self._open(parse(journal.settings, str(journal.path)), task)
            self._match(header)
            directory = RunDirectory(Path(run))
            self._rebuild(directory, journal)
            self._start(directory, journal, monitors)
        except BaseException:
            journal.close()
            raise
        return self

    def train(self) -> Summary:
        """Take the steps that are left; Ctrl-C ends the run after the step in hand, a second one at once.

        Returns:
            What the run came to.
        """
        began = time.perf_counter()
        self._tell(lambda m: m.on_train_begin(self._plan()))
        try:
            with _interruptible() as interrupted:
                ended = self._loop(interrupted)
            self._save(self.run.final)
            summary = self._summary(ended, time.perf_counter() - began)
            self._tell(lambda m: m.on_train_end(summary))
            return summary
        finally:
            self.close()

    def close(self) -> None:
        """Release threads and files. `train` does so itself."""
        self.pool.close()
        self.journal.close()
        self._tell(lambda m: m.close())

    def _open(self, config: Config, task: Task | None) -> None:
        self.config = config
        self.task = task or config.task.build(config.seed)
        loaded = load_model(config)
        self.checkpoint, self.engine, self.pool, self.weights = (
            loaded.checkpoint,
            loaded.engine,
            loaded.pool,
            loaded.weights,
        )
        self.strategy = make_strategy(config)
        self.order = RowOrder(len(self.task.train), config.prompts_per_step, config.seed)
        self._evaluation_ids = self.engine.encode([row["prompt"] for row in self.task.evaluation])
        self.engine.check(self._evaluation_ids, make_sampling(config))

    def _start(self, run: RunDirectory, journal: Journal, monitors: Sequence[Monitor] | None) -> None:
        self.run, self.journal = run, journal
        self.tokens = 0.0
        self.monitors = list(default_monitors(run, self.config) if monitors is None else monitors)

    def _match(self, header: Header) -> None:
        found = self.checkpoint.content_hash()
        if found != header.base_hash:
            raise EstuneError(
                f"base model {header.model}: content hash {found}, the run began with {header.base_hash}; "
                "put the original back"
            )
        if self.task.data_hash() != header.data_hash:
            raise EstuneError(f"task {self.task.name}: its data are not those the run began with; put them back")

    def _rebuild(self, run: RunDirectory, journal: Journal) -> None:
        """Bring the weights to the journal's last step, from the latest checkpoint that is there."""
        done = len(journal.steps)
        start = next((s for s in run.checkpoints() if 0 < s <= done), 0)
        if start:
            self.weights.load(Checkpoint(run.checkpoint(start)))
        for record in journal.steps[start:]:
            if self.config.weights == "inplace":  # what rounding left behind at each restore is part of the run
                for member in record.update.members:
                    self.weights.perturb(member, record.sigma)
            self.weights.apply(record.update)
        if self.weights.fingerprint() != journal.fingerprint():
            where = f"checkpoint-{start} and " if start else ""
            raise EstuneError(
                f"{run.path}: {where}{done - start} replayed steps give fingerprint {self.weights.fingerprint()}, the "
                f"journal says {journal.fingerprint()}" + (f"; remove checkpoint-{start} and resume" if start else "")
            )
        self.strategy.step = done

    def _loop(self, interrupted: Callable[[], bool]) -> str:
        last = self.config.steps
        while True:
            step = self.strategy.step
            ends = step >= last
            if (ends or self._due(step, self.config.eval_steps)) and not interrupted():
                self._evaluate(step)
            if ends:
                return "finished"
            if interrupted():
                return "interrupted"
            if self._patience_is_over():
                return "stopped early"
            self._step()
            if self._due(self.strategy.step, self.config.save_steps):
                self._save(self.run.checkpoint(self.strategy.step), self.weights.dtype)

    def _due(self, step: int, every: int) -> bool:
        return step == 0 or (every > 0 and step % every == 0)

    def _step(self) -> None:
        began = time.perf_counter()
        config, step, sigma = self.config, self.strategy.step, self.strategy.sigma
        rate = self.strategy.learning_rate
        indices = self.order.rows(step)
        rows = [self.task.train[i] for i in indices]
        prompt_ids = self.engine.encode([row["prompt"] for row in rows])
        sampling = make_sampling(config, member_seed(config.seed, step, 1 << 23))
        members = self.strategy.ask()
        rewards: list[float | None] = [None] * len(members)
        graded: dict[int, Graded] = {}
        times = {"perturb": 0.0, "generate": 0.0, "grade": 0.0}
        for done in self.pool.evaluate(members, sigma, prompt_ids, sampling):
            start = time.perf_counter()
            result = grade_completions(self.task, rows, done.completions)
            rewards[done.index], graded[done.index] = result.grades.mean, result
            times["grade"] += time.perf_counter() - start
            times["perturb"] += done.perturb_time
            times["generate"] += done.generate_time
            self._tell(lambda m: m.on_member_end(len(graded), len(members)))
        if all(r is None for r in rewards):
            raise EstuneError(f"step {step}: no member has a reward, see the warnings; mend the reward and resume")

        start = time.perf_counter()
        update = self.strategy.tell(rewards)
        self.pool.apply(update)
        fingerprint = self.weights.fingerprint()
        times["update"] = time.perf_counter() - start
        record = StepRecord(update, sigma, rate, rewards, indices, fingerprint, times)
        self.journal.append_step(record)
        times["step"] = time.perf_counter() - began
        self._report_step(record, [graded[i] for i in range(len(members))])

    def _report_step(self, record: StepRecord, graded: list[Graded]) -> None:
        step, times = record.step + 1, record.times
        self.tokens += sum(g.tokens for g in graded)
        valid = [r for r in record.rewards if r is not None]
        mean, std = mean_and_std(valid)
        each = [g.metrics() for g in graded]
        averages = {key: mean_and_std([m[key] for m in each])[0] for key in each[0] if key != "reward"}
        metrics = {
            "step": step,
            "reward": mean,
            "reward_std": std,
            "reward_min": min(valid),
            "reward_max": max(valid),
            **averages,
            "failed_members": len(record.rewards) - len(valid),
            "learning_rate": record.learning_rate,
            "num_tokens": self.tokens,
            "step_time": times["step"],
            **{f"time/{key}": value for key, value in times.items() if key != "step"},
        }
        if self.config.weights == "inplace":
            drift = self.weights.drift()
            metrics |= {"weights/drift_changed": drift.changed, "weights/drift_rms": drift.rms}
        kept = graded[: self.config.log_completions]
        if kept:
            records = [r for member, g in enumerate(kept) for r in g.records(step=step, member=member)]
            write_completions(self.run.completions(f"step-{step:05d}"), records)
        self._tell(lambda m: m.on_step_end(metrics, graded[0].sample()))

    def _evaluate(self, step: int) -> None:
        if any(e.step == step for e in self.journal.evaluations):
            return  # the run was cut off after this evaluation, and goes on from here
        start = time.perf_counter()
        completions = self.pool.generate(self._evaluation_ids, make_sampling(self.config))
        graded = grade_completions(self.task, self.task.evaluation, completions)
        metrics = evaluation_metrics(self.task, graded)
        best = self._best()
        if best is None or _rank(metrics) > _rank(best.metrics):
            self._save(self.run.best)
        self.journal.append_evaluation(EvaluationRecord(step, metrics))
        write_completions(self.run.completions(f"evaluation-{step:05d}"), graded.records(step=step))
        shown = {"step": step, **metrics, "eval_runtime": time.perf_counter() - start}
        self._tell(lambda m: m.on_evaluate(shown, graded.sample()))

    def _best(self) -> EvaluationRecord | None:
        return max(self.journal.evaluations, key=lambda e: _rank(e.metrics), default=None)

    def _patience_is_over(self) -> bool:
        patience, best = self.config.early_stopping_patience, self._best()
        if patience is None or best is None:
            return False
        return sum(e.step > best.step for e in self.journal.evaluations) >= patience

    def _save(self, path: Path, dtype: str | None = None) -> None:
        dtype = dtype or self.journal.header.live_dtype
        self.checkpoint.write(path, self.weights.runs(), dtype)

    def _plan(self) -> Plan:
        weights = self.weights
        return Plan(
            run=self.run.path,
            model=self.config.model,
            parameters=sum(p.tensor.numel() for p in weights.parameters),
            task=self.task.name,
            steps=self.config.steps,
            first_step=self.strategy.step,
            population=self.config.population,
            prompts_per_step=self.order.per_step,
            train_size=len(self.task.train),
            eval_size=len(self.task.evaluation),
            config=self.config.model_dump(mode="json"),
        )

    def _summary(self, ended: str, seconds: float) -> Summary:
        evaluations, best = self.journal.evaluations, self._best()
        if best is None:  # interrupted before the first evaluation
            return Summary(self.run.path, self.strategy.step, seconds, {}, {}, {}, 0, ended)
        first, last = evaluations[0], evaluations[-1]
        return Summary(
            self.run.path,
            self.strategy.step,
            seconds,
            first.metrics,
            last.metrics,
            best.metrics,
            best.step,
            ended,
        )

    def _tell(self, call: Callable[[Monitor], None]) -> None:
        for monitor in getattr(self, "monitors", []):
            call(monitor)


def _rank(metrics: Mapping[str, float]) -> tuple[float, float]:
    """What a run is judged by: accuracy, then reward."""
    return metrics["eval_accuracy"], metrics["eval_reward"]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within this, the first Ctrl-C sets a flag, which the yielded function tells; the second one raises."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> Any:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log.warning("stopping after this step; press Ctrl-C again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, previous)

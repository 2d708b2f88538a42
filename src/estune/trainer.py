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

from estune.config import Config, parse
from estune.data import RowOrder
from estune.engines.base import Engine
from estune.errors import EstuneError
from estune.evaluation import Graded, evaluation_metrics, grade_completions, step_metrics, write_completions
from estune.journal import EvaluationRecord, Header, Journal, StepRecord
from estune.monitors import default_monitors
from estune.monitors.base import Monitor, Plan, Summary
from estune.monitors.files import rewrite_metrics
from estune.replay import base_checkpoint
from estune.run import RESUME_FROM_PYTHON, RunDirectory, default_path, packages, refuse_used, task_of
from estune.setup import make_sampling, make_strategy, open_pool, with_resources
from estune.storage import type_name
from estune.strategy import member_seed
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
        task = task or config.task.build(config.seed)
        path = config.output_dir or default_path(config, task.name)
        refuse_used(path)
        config = with_resources(config)
        self._open(config, task, first_step=0)
        try:
            weights = self.replica.weights
            header = Header(
                model=config.model,
                base_hash=self.replica.checkpoint.content_hash(),
                policy=config.weights,
                rounding=config.rounding,
                noise=config.noise,
                dtype=weights.dtype,
                live_dtype=type_name(self.replica.engine.model.dtype),
                tensors={p.name: list(p.aliases) for p in weights.parameters},
                fingerprint=weights.fingerprint(),
                task=task.name,
                data_hash=task.data_hash(),
                config=config.model_dump(mode="json"),
                packages=packages(),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            run = RunDirectory.create(path, config)
            self._start(run, Journal.create(run.path, header), monitors)
        except BaseException:
            self.pool.close()
            raise

    @classmethod
    def resume(
        cls,
        run: str | Path,
        *,
        steps: int | None = None,
        model: str | None = None,
        task: Task | None = None,
        monitors: Sequence[Monitor] | None = None,
    ) -> Trainer:
        """Go on with a run where its journal ends, to the same bits an undisturbed run would have.

        Args:
            run: the run's directory.
            steps: a new total, to make a run longer or shorter.
            model: the base model, where it now lies elsewhere than the journal says.
            task, monitors: as for a new run.

        Raises:
            EstuneError: where journal, base model or data are not what the run began with, or nothing is left to do.
        """
        directory = RunDirectory(Path(run))
        journal = Journal.resume(directory.path)
        self = cls.__new__(cls)
        try:
            changed = {} if steps is None else {"steps": steps}
            config = parse({**journal.settings, **changed}, str(journal.path))
            done = len(journal.steps)
            if config.steps <= done and directory.final.is_dir():
                raise EstuneError(f"{run}: all {done} steps are done; give --steps above {done} to go on")
            config = config.model_copy(update={"model": model or config.model})
            task = task_of(directory.path, journal.header, config, RESUME_FROM_PYTHON, task=task)
            base_checkpoint(journal.header, config.model)
            self._open(config, task, first_step=done)
        except BaseException:
            journal.close()
            raise
        try:
            self._rebuild(directory, journal)
            if config.steps != journal.settings["steps"]:
                journal.append_settings({"steps": config.steps})
                directory.write_settings(config)
            self._start(directory, journal, monitors)
        except BaseException:
            journal.close()
            self.pool.close()
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
        """Release processes, threads and files. `train` does so itself."""
        self.pool.close()
        self.journal.close()
        self._tell(lambda m: m.close())

    def _open(self, config: Config, task: Task, first_step: int) -> None:
        """Load the model and see that everything the run will generate can be generated."""
        self.config, self.task = config, task
        self.strategy = make_strategy(config)
        self.order = RowOrder(len(task.train), config.prompts_per_step, config.seed)
        self.monitors: list[Monitor] = []
        self.replica, self.pool = open_pool(config)
        try:
            used = sorted({row for step in range(first_step, config.steps) for row in self.order.rows(step)})
            self._encode("training row", task.train, used)
            self._evaluation_ids = self._encode("evaluation row", task.evaluation, range(len(task.evaluation)))
        except BaseException:
            self.pool.close()
            raise

    def _encode(self, what: str, rows: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> list[list[int]]:
        """Token ids of rows' prompts; a prompt that cannot be generated from is refused by its row."""
        engine: Engine = self.replica.engine
        sampling = make_sampling(self.config)
        try:
            ids = engine.encode([rows[i]["prompt"] for i in indices])
            engine.check(ids, sampling)
            return ids
        except EstuneError:
            for i in indices:
                try:
                    engine.check(engine.encode([rows[i]["prompt"]]), sampling)
                except EstuneError as error:
                    raise EstuneError(f"{what} {i}: {str(error).removeprefix('prompt 0: ')}") from error
            raise

    def _start(self, run: RunDirectory, journal: Journal, monitors: Sequence[Monitor] | None) -> None:
        self.run, self.journal = run, journal
        self._began_at = len(journal.steps)
        rewrite_metrics(run.metrics, [e.metrics for e in journal.chronicle()])  # a crash may have cost the last lines
        self.monitors = list(default_monitors(run, self.config) if monitors is None else monitors)

    def _rebuild(self, run: RunDirectory, journal: Journal) -> None:
        """Bring the weights to the journal's last step, from the latest checkpoint that is there."""
        live, expected = type_name(self.replica.engine.model.dtype), journal.header.live_dtype
        if live != expected:
            raise EstuneError(
                f"{run.path}: the run generates with {expected} weights, which here, on {self.replica.engine.device}, "
                f"are loaded as {live}; resume it on the kind of device that it began on"
            )
        done = len(journal.steps)
        start = next((s for s in run.checkpoints() if 0 < s <= done), 0)
        if start:
            self.pool.load(run.checkpoint(start))
        for record in journal.steps[start:]:
            if self.config.weights == "inplace":  # what rounding left behind at each restore is part of the run
                for member in record.update.members:
                    self.replica.weights.perturb(member, record.sigma)
            self.pool.apply(record.update)
        found = self.replica.weights.fingerprint()
        if found != journal.fingerprint():
            where = f"checkpoint-{start} and " if start else ""
            raise EstuneError(
                f"{run.path}: {where}{done - start} replayed steps give fingerprint {found}, the journal says "
                f"{journal.fingerprint()}" + (f"; remove checkpoint-{start} and resume" if start else "")
            )
        self.strategy.step = done

    def _loop(self, interrupted: Callable[[], bool]) -> str:
        while True:
            step, last = self.strategy.step, self.config.steps
            if interrupted():
                return "interrupted"
            if step >= last or self._due(step, self.config.eval_steps):
                self._evaluate(step)
            if step >= last:
                return "finished"
            if self._patience_is_over():
                return "stopped early"
            self._step()
            if self._due(self.strategy.step, self.config.save_steps):
                self._save(self.run.checkpoint(self.strategy.step), self.replica.weights.dtype)

    def _due(self, step: int, every: int) -> bool:
        return step == 0 or (every > 0 and step % every == 0)

    def _step(self) -> None:
        began = time.perf_counter()
        config, step, sigma = self.config, self.strategy.step, self.strategy.sigma
        rate = self.strategy.learning_rate
        indices = self.order.rows(step)
        rows = [self.task.train[i] for i in indices]
        prompt_ids = self.replica.engine.encode([row["prompt"] for row in rows])
        sampling = make_sampling(config, member_seed(config.seed, step, 1 << 23))
        members = self.strategy.ask()
        graded: dict[int, Graded] = {}
        times = {"perturb": 0.0, "generate": 0.0, "grade": 0.0}
        for index, done in self.pool.evaluate(members, sigma, prompt_ids, sampling):
            start = time.perf_counter()
            graded[index] = grade_completions(self.task, rows, done.completions)
            times["grade"] += time.perf_counter() - start
            times["perturb"] += done.perturb_time
            times["generate"] += done.generate_time
            self._tell(lambda m: m.on_member_end(len(graded), len(members)))
        in_order = [graded[i] for i in range(len(members))]
        rewards = [g.grades.mean for g in in_order]
        if all(r is None for r in rewards):
            raise EstuneError(f"step {step}: no member has a reward, see the warnings; mend the reward and resume")

        drift = self.replica.weights.drift() if config.weights == "inplace" else None
        start = time.perf_counter()
        update = self.strategy.tell(rewards)
        fingerprint = self.pool.apply(update)
        times["update"] = time.perf_counter() - start
        metrics = {"step": step + 1, **step_metrics(in_order), "learning_rate": rate}
        if drift is not None:
            metrics |= {"weights/drift_changed": drift.changed, "weights/drift_rms": drift.rms}
        metrics["num_tokens"] = self._tokens() + sum(g.tokens for g in in_order)
        metrics["step_time"] = time.perf_counter() - began
        metrics |= {f"time/{key}": value for key, value in times.items()}
        self.journal.append_step(StepRecord(update, sigma, rate, rewards, indices, fingerprint, metrics))
        kept = in_order[: config.log_completions]
        if kept:
            records = [r for member, g in enumerate(kept) for r in g.records(step=step + 1, member=member)]
            write_completions(self.run.completions(f"step-{step + 1:05d}"), records)
        self._tell(lambda m: m.on_step_end(metrics, in_order[0].sample()))

    def _tokens(self) -> float:
        """Tokens generated by all steps so far."""
        return self.journal.steps[-1].metrics.get("num_tokens", 0) if self.journal.steps else 0

    def _evaluate(self, step: int) -> None:
        if any(e.step == step for e in self.journal.evaluations):
            return  # the run was cut off after this evaluation, and goes on from here
        completions = self.pool.generate(self._evaluation_ids, make_sampling(self.config))
        graded = grade_completions(self.task, self.task.evaluation, completions)
        metrics = {"step": step, **evaluation_metrics(self.task, graded)}
        best = self._best()
        if best is None or _rank(metrics) > _rank(best.metrics):
            self._save(self.run.best)
        write_completions(self.run.completions(f"evaluation-{step:05d}"), graded.records(step=step))
        self.journal.append_evaluation(EvaluationRecord(step, metrics))
        self._tell(lambda m: m.on_evaluate(metrics, graded.sample()))

    def _best(self) -> EvaluationRecord | None:
        return max(self.journal.evaluations, key=lambda e: _rank(e.metrics), default=None)

    def _patience_is_over(self) -> bool:
        """Whether so many evaluations brought no new best. Resuming gives new patience."""
        patience, best = self.config.early_stopping_patience, self._best()
        if patience is None or best is None:
            return False
        return sum(e.step > max(best.step, self._began_at) for e in self.journal.evaluations) >= patience

    def _save(self, path: Path, dtype: str | None = None) -> None:
        dtype = dtype or self.journal.header.live_dtype
        self.replica.checkpoint.write(path, self.replica.weights.runs(), dtype)

    def _plan(self) -> Plan:
        return Plan(
            run=self.run.path,
            model=self.config.model,
            parameters=sum(p.tensor.numel() for p in self.replica.weights.parameters),
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
        return Summary(
            run=self.run.path,
            steps=self.strategy.step,
            seconds=seconds,
            before=evaluations[0].metrics if evaluations else {},
            after=evaluations[-1].metrics if evaluations else {},
            best=best.metrics if best else {},
            ended=ended,
        )

    def _tell(self, call: Callable[[Monitor], None]) -> None:
        for monitor in self.monitors:
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

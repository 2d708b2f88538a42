"""The loop: steps, evaluations and checkpoints, until all steps are taken or something ends the run before."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from estune.config import Config
from estune.engines.tokenizer import open_encoder
from estune.files import clear_temporary, remove
from estune.grading.convention import TrainerState
from estune.grading.isolation import refuse_grader
from estune.journal.journal import going_on
from estune.journal.records import BEST_BY, EvaluationRecord, rank
from estune.journal.shares import is_share
from estune.pool.base import EVALUATION_BATCH
from estune.pool.open import open_pool, with_resources
from estune.pool.waiting import told_while
from estune.run import remarks
from estune.run.asked import Asking
from estune.run.begin import NewRun, refuse_unfit
from estune.run.directory import how_to_go_on
from estune.run.due import checkpoint_is_due, evaluation_is_due
from estune.run.evaluations import Evaluations
from estune.run.graded import write_completions
from estune.run.guard import falls_short
from estune.run.held_out import encode_rows, hash_of_prompts, token_ids
from estune.run.interrupt import interruptible
from estune.run.machine import machine
from estune.run.make import make_grading, make_order, make_sampling
from estune.run.monitors import Monitors, check_trackers, default_monitors
from estune.run.monitors.base import Plan, Request, Summary
from estune.run.monitors.files import rewrite_metrics
from estune.run.monitors.listeners import Listeners
from estune.run.resume import Past, reopen
from estune.run.step import Stepping
from estune.tasks.base import Task
from estune.tasks.preflight import preflight

log = logging.getLogger(__name__)


class Trainer:
    """Fine-tunes a model on a task.

    Args:
        config: the settings.
        task: a task of your own; by default the one the settings name.
        monitors: who is told what happens; by default the console and the files of the run.
            A function makes them of the run's directory and its settings.
        best_by: metrics that tell which evaluation is the best, the first first; `-` stands before one of which less is
            better.
        past: the run to go on with, which `resume` gives.
        go_on: what the user does to go on with the run, in which `{run}` stands for its directory in a shell, `{text}`
            in Python: for messages; by default the command, or `Trainer.resume` where the task is one of your own.

    Raises:
        EstuneError: for settings, data or a model that cannot be trained with, before anything is written.
    """

    def __init__(
        self,
        config: Config,
        *,
        task: Task | None = None,
        monitors: Monitors | None = None,
        best_by: Sequence[str] = BEST_BY,
        past: Past | None = None,
        go_on: str | None = None,
    ) -> None:
        refuse_grader()
        go_on = go_on or how_to_go_on(config, own_task=task is not None)
        origin = past or NewRun(config, task, best_by, go_on)
        with ExitStack() as opened:
            opened.callback(origin.close)
            if not isinstance(monitors, Sequence):
                check_trackers(config)
            self.task = origin.task
            config = with_resources(origin.config, origin.live_dtype, alone=self.task.rollout is not None)
            self._began_at = origin.steps
            self.order = make_order(config, self.task)
            remarks.log_before(config, self.task, self.order)
            self._open(config, origin, opened)
            self.standing = standing = origin.open(config, self.pool, self.trained)
            self.strategy = standing.strategy
            self.config = config = standing.config
            self.run = standing.run
            self.journal = standing.journal
            self.run.note_machine(machine(self.trained.device))
            self.journal.go_on = going_on(go_on, self.run.path)
            # A crash may have cost the last lines.
            rewrite_metrics(self.run.metrics, [e.metrics for e in self.journal.chronicle()])
            make = monitors if callable(monitors) else default_monitors
            self.monitors = list(monitors if isinstance(monitors, Sequence) else make(self.run, config))
            self._listeners = Listeners(self.monitors, self.pool, config.max_new_tokens)
            opened.callback(lambda: self._listeners.tell(lambda m: m.close()))
            self.asking = Asking(self.task, self.encoder, self.order, standing)
            self._stepping = Stepping(self.task, standing, self.asking, self.grading, self._listeners)
            self._remarks = remarks.Remarks()
            origin.begun(config)
            self._opened = opened.pop_all()

    @classmethod
    def resume(
        cls,
        run: str | Path,
        *,
        task: Task | None = None,
        monitors: Monitors | None = None,
        accept_changes: bool = False,
        trust_task: bool = False,
        go_on: str | None = None,
        **changed: Any,
    ) -> Self:
        """Go on with a run where its journal ends, to the same bits an undisturbed run would have.

        What a kill or a power cut has taken of `best`, `final` and checkpoints is made again.

        Args:
            run: the run's directory.
            task, monitors, go_on: as for a new run.
            accept_changes: go on with the model's configuration and tokenizer and the task's code as they are now,
                where they are not what the run began with; the journal says so from here on.
            trust_task: run the code that the journal names, which you have not run before.
            changed: settings of `RESUMABLE`: `steps`, a new total; `model`, where the base model lies now;
                `trust_remote_code`, to be given again where the run had it; `workers` and what belongs to them;
                `report_to`.

        Raises:
            EstuneError: where journal, base model or data are not what the run began with, nothing is left to do, or
                another setting is to change.
        """
        past = reopen(Path(run), changed, task=task, accept_changes=accept_changes, trust_task=trust_task)
        go_on = go_on or how_to_go_on(past.config, own_task=task is not None)
        return cls(past.config, task=past.task, monitors=monitors, past=past, go_on=go_on)

    def train(self) -> Summary:
        """Take the steps that are left; Ctrl-C ends the run after the step in hand, a second one at once.

        Returns:
            What the run came to.
        """
        began = time.perf_counter()
        try:
            self._listeners.tell(lambda m: m.on_train_begin(self.plan()))
            remove(self.run.final)  # an earlier end's, where the run goes on
            if self.journal.steps or self.journal.evaluations:
                self._catch_up()
            with interruptible() as interrupted:
                ended = self._loop(interrupted)
            self.asking.drop_ahead()
            self.standing.save_final()
            summary = self._summary(ended, time.perf_counter() - began)
            self._listeners.tell(lambda m: m.on_train_end(summary))
            self.journal.append_end(ended)  # last: it says that all is there
            return summary
        except KeyboardInterrupt:
            log.warning("stopped at once, which lost this step alone; go on with: %s", self.journal.go_on)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Release processes, threads and files. `train` does so itself."""
        self._opened.close()

    def _open(self, config: Config, origin: NewRun | Past, opened: ExitStack) -> None:
        """See that everything the run will generate can be generated, and load the model."""
        clear_temporary()
        task = self.task
        refuse_unfit(config, task)
        self.encoder = open_encoder(config)
        used = {i: task.train[i] for i in self.order.used(0, config.steps)}
        ids = encode_rows(self.encoder, task, used, "training row", make_sampling(config))
        self.state = TrainerState(origin.steps, config.steps, rendering=config.rendering)
        self.grading = make_grading(config, task, self.state)
        first = token_ids(self.encoder, task, (task.train[i] for i in self.order.rows(0)))
        opened.callback(self.grading.close)
        self._prompt_tokens = sum(map(len, first)) * config.samples_per_prompt // config.prompt_groups
        self.evaluations = Evaluations(task, config, self.encoder, origin.folder, self.grading)
        opened.callback(self.evaluations.close)
        origin.check(self.evaluations, hash_of_prompts(first, self.evaluations.own.prompt_ids))
        preflight(task, self.grading)
        self.pool = open_pool(config, max([self.evaluations.longest, *map(len, ids)]))
        opened.callback(self.pool.close)
        with told_while("taking the fingerprint of the weights"):
            self.trained = self.pool.describe()

    def _catch_up(self) -> None:
        """Do what the run was about to do when it was cut off, and make again what it has lost of its checkpoints."""
        if self.strategy.displaced:
            self._whole_step()
        step = self.standing.step
        if evaluation_is_due(self.config, step):
            self._evaluate()
        undone = step - 1 in self.journal.undone  # whose checkpoints are removed
        if checkpoint_is_due(self.config, step) and not undone and step not in self.run.checkpoints():
            self._save_checkpoint()
        self.standing.remake_lost()

    def _loop(self, interrupted: Callable[[], bool]) -> str:
        asked_for: set[Request] = set()
        while True:
            step = self.standing.step
            last = self.config.steps
            if step < last and interrupted():
                return "interrupted"
            if evaluation_is_due(self.config, step):
                self._evaluate()
            if step >= last:
                return "finished"
            if self._patience_is_over() or self._stops_collapsed() or "stop" in asked_for | self._listeners.requests():
                return "stopped early"
            asked_for = self._whole_step()
            if "evaluate" in asked_for:
                self._evaluate()
            due = checkpoint_is_due(self.config, self.standing.step)
            if due or "save" in asked_for | self._listeners.requests():
                self._save_checkpoint()

    def _whole_step(self) -> set[Request]:
        """Take a step, or what is left of two that make a sharpness-aware one; give what monitors ask for after it."""
        asked_for = set()
        while True:
            self._listeners.tell(lambda m: m.on_step_begin(self.standing.step + 1))
            self._stepping.take()
            self._remarks.has_collapsed(self.journal)
            asked_for |= self._listeners.requests()
            if not self.strategy.displaced:
                return asked_for

    def _evaluate(self) -> None:
        """Evaluate the weights, keep them if they are the best so far, and go back to the best if they fall short."""
        step = self.standing.step
        journal = self.journal
        if not self.task.evaluation or any(e.step == step for e in journal.evaluations):
            return  # nothing to evaluate on, or the run was cut off after this evaluation, and goes on from here
        self.asking.drop_ahead()
        compare = self.pool.compare if self.config.compare_with_base else None
        metrics, graded = self.evaluations.evaluate(self.pool, step, self.run, self._tell_prompts, compare=compare)
        best = journal.best
        best_by = journal.header.best_by
        if best is None or rank(metrics, best_by) > rank(best.metrics, best_by):
            self.standing.save_best()
        write_completions(self.run.completions(f"evaluation-{step:05d}"), graded.records(step=step))
        record = EvaluationRecord(step, metrics)
        over = step >= self.config.steps
        most = None if over else self.config.back_to_best
        if best is not None and most is not None and falls_short(record, best, best_by, most):
            record = self.standing.go_back(record, best.step)
        else:
            journal.append_evaluation(record)
        self._listeners.tell(lambda m: m.on_evaluate(metrics, graded.sample()))
        if record.back is not None:
            log.warning(
                "step %d: worse than after step %d: back to the weights there, half the learning rate",
                step,
                record.back,
            )
        self._remarks.say("accuracy", remarks.never_right(self.task, journal.evaluations, over=over))
        self._remarks.has_collapsed(journal)

    def _tell_prompts(self, name: str, prompts: Sequence[Sequence[int]]) -> None:
        self._listeners.tell_work(name, prompts, math.ceil(len(prompts) / EVALUATION_BATCH))

    def _stops_collapsed(self) -> bool:
        """Whether the run is to end, as it has collapsed: by journal and settings alone, so that resuming agrees."""
        if not self.config.stop_on_collapse or not self._remarks.has_collapsed(self.journal):
            return False
        log.warning("stopped, as it has collapsed; to go on all the same, resume with stop_on_collapse=false")
        return True

    def _patience_is_over(self) -> bool:
        """Whether so many evaluations brought no new best. Resuming gives new patience."""
        patience = self.config.early_stopping_patience
        best = self.journal.best
        if patience is None or best is None:
            return False
        return sum(e.step > max(best.step, self._began_at) for e in self.journal.evaluations) >= patience

    def _save_checkpoint(self) -> None:
        self.asking.drop_ahead()
        self.standing.save_checkpoint()
        self._listeners.tell(lambda m: m.on_save(self.standing.step))

    def _shares(self) -> list[str]:
        """Accuracies that are shown in percent."""
        return [key for key in self.evaluations.accuracies if is_share(self.journal, key)]

    def plan(self) -> Plan:
        """What the run sets out to do."""
        return Plan(
            run=self.run.path,
            model=self.config.model,
            parameters=self.trained.elements,
            task=self.task.name,
            steps=self.config.steps,
            first_step=self.standing.step,
            population=self.config.members,
            prompts_per_step=self.order.per_step // self.config.prompt_groups * self.config.samples_per_prompt,
            prompt_tokens=self._prompt_tokens,
            engines=self.pool.engines,
            train_size=len(self.task.train),
            eval_size=len(self.task.evaluation),
            config=self.config.model_dump(mode="json"),
            history=[event.metrics for event in self.journal.chronicle()],
            shares=self._shares(),
        )

    def _summary(self, ended: str, seconds: float) -> Summary:
        evaluations = self.journal.evaluations
        best = self.journal.best
        return Summary(
            run=self.run.path,
            steps=self.standing.step,
            seconds=seconds,
            before=evaluations[0].metrics if evaluations else {},
            after=evaluations[-1].metrics if evaluations else {},
            best=best.metrics if best else {},
            ended=ended,
            shares=self._shares(),
            go_on=self.journal.go_on,
            taken_back=sum(step.metrics.get("taken_back", 0) > 0 for step in self.journal.steps),
            back=sum(evaluation.back is not None for evaluation in evaluations),
        )

"""The loop: ask, evaluate the members, grade each while the next generates, tell, apply, record."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from estune.config import Config
from estune.engines.loading import open_encoder
from estune.errors import ACCEPT, EstuneError
from estune.es.strategy import Update
from estune.files import clear_temporary, remove
from estune.grading.convention import TrainerState
from estune.grading.isolation import refuse_grader
from estune.grading.level import refuse_level
from estune.journal.journal import Journal, going_on
from estune.journal.records import BEST_BY, EvaluationRecord, StepRecord, rank
from estune.journal.shares import is_share
from estune.pool.base import EVALUATION_BATCH
from estune.pool.open import open_pool, with_resources
from estune.pool.waiting import told_while
from estune.run import remarks
from estune.run.asked import Asked, Asking
from estune.run.code import code_of
from estune.run.directory import RunDirectory, default_path, how_to_go_on, refuse_used
from estune.run.evaluations import Evaluations
from estune.run.graded import Graded, step_metrics, write_completions
from estune.run.guard import Look, falls_short, mean_reward
from estune.run.held_out import encode_rows, hash_of_prompts, refuse_unreachable, token_ids
from estune.run.interrupt import interruptible
from estune.run.judged import Judge
from estune.run.machine import machine
from estune.run.make import (
    make_grading,
    make_header,
    make_order,
    make_sampling,
    make_strategy,
    recall,
    state_after,
)
from estune.run.metric_names import of_evaluation, refuse_unknown_best, refuse_unknown_constraint
from estune.run.monitors import Monitors, check_trackers, default_monitors
from estune.run.monitors.base import Monitor, Plan, Summary, Work
from estune.run.monitors.files import rewrite_metrics
from estune.run.replaying import inherit, refuse_other_weights, remake_lost, replay_all
from estune.run.resume import Past, following, parent_of, refuse_changed_prompts, reopen
from estune.run.trust import remember
from estune.tasks.base import Task
from estune.tasks.preflight import preflight
from estune.weights.adapted import open_checkpoint
from estune.weights.locate import check_name
from estune.weights.policies import POLICIES
from estune.weights.trained import Drift

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
        options = config.task if task is None else None
        go_on = go_on or how_to_go_on(config, own_task=task is not None)
        if past is None:
            check_name(config.model)
        task = task or config.task.build(config.seed)
        if past is None:
            path = config.output_dir or default_path(config, task.name)
            refuse_used(path, go_on)
        with ExitStack() as opened, ExitStack() as undo:
            if past is not None:
                opened.callback(past.journal.close)
            if not isinstance(monitors, Sequence):
                check_trackers(config)
            parent = parent_of(config) if past is None else None
            live = None if past is None else past.journal.header.live_dtype
            self.config = config = with_resources(following(config, parent), live, alone=task.rollout is not None)
            self.task = task
            self._began_at = 0 if past is None else len(past.journal.steps)
            self.order = make_order(config, task)
            self.state = TrainerState(self._began_at, config.steps, rendering=config.rendering)
            self._said: set[str] = set()
            remarks.log_before(config, task, self.order)
            self._open_all(opened, past, best_by)
            self.base = open_checkpoint(config.model, config.adapter) if past is None else past.base
            self.config = config = self._settled(past)
            if past is None:
                self.run, self.journal = self._begin(path, parent, code_of(task.reward_funcs, options), best_by)
                opened.callback(self.journal.close)
                undo.callback(self.run.discard)  # so that the same command can be given again
                self.run.write_settings(config)
            else:
                self.run = past.run
                self.journal = past.journal
                self._rebuild()
            self.run.note_machine(machine(self.trained.device))
            self.journal.go_on = going_on(go_on, self.run.path)
            self.strategy = make_strategy(config, self.journal)
            self.judge = Judge(config, self.journal.state)
            self.asking = Asking(config, task, self.encoder, self.order, self.strategy, self.pool, self.journal)
            # A crash may have cost the last lines.
            rewrite_metrics(self.run.metrics, [e.metrics for e in self.journal.chronicle()])
            make = monitors if callable(monitors) else default_monitors
            self.monitors = list(monitors if isinstance(monitors, Sequence) else make(self.run, config))
            opened.callback(lambda: self._tell(lambda m: m.close()))
            if past is None:
                remember(config)
            else:
                self._note_changes(past)
            undo.pop_all()
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
        self._tell(lambda m: m.on_train_begin(self.plan()))
        try:
            remove(self.run.final)  # an earlier end's, where the run goes on
            if self.journal.steps or self.journal.evaluations:
                self._catch_up()
            with interruptible() as interrupted:
                ended = self._loop(interrupted)
            self.asking.drop_ahead()
            self._save(self.run.final)
            summary = self._summary(ended, time.perf_counter() - began)
            self._tell(lambda m: m.on_train_end(summary))
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

    def _open_all(self, opened: ExitStack, past: Past | None, best_by: Sequence[str]) -> None:
        """See that everything the run will generate can be generated, and load the model."""
        clear_temporary()
        config = self.config
        task = self.task
        refuse_unreachable(task, config)
        refuse_unknown_constraint(config, task)
        if task.rollout is not None and config.noise_rank and not config.device.startswith("cpu"):
            POLICIES[config.weights].refuse_low_rank()
        if config.prompt_groups > 1:
            refuse_level(task.reward_funcs, "prompt_groups", "groups of members have other prompts", "population")
        self.encoder = open_encoder(config)
        used = {i: task.train[i] for i in self.order.used(0, config.steps)}
        ids = encode_rows(self.encoder, task, used, "training row", make_sampling(config))
        self.grading = make_grading(config, task, self.state)
        first = token_ids(self.encoder, task, (task.train[i] for i in self.order.rows(0)))
        opened.callback(self.grading.close)
        self._prompt_tokens = sum(map(len, first)) * config.samples_per_prompt // config.prompt_groups
        folder = Path.cwd() if past is None else past.folder
        self.evaluations = Evaluations(task, config, self.encoder, self.grading, folder)
        opened.callback(self.evaluations.close)
        if past is None and task.evaluation:
            watched = {name: each.task for name, each in self.evaluations.watched.items()}
            refuse_unknown_best(best_by, of_evaluation(task, config, watched))
        self._prompts_hash = hash_of_prompts(first, self.evaluations.own.prompt_ids)
        if past is not None:
            self._accepted_prompts = refuse_changed_prompts(
                past.journal, self._prompts_hash, accept=past.accept_changes
            )
        preflight(task, self.grading)
        self.pool = open_pool(config, max([self.evaluations.longest, *map(len, ids)]))
        opened.callback(self.pool.close)
        with told_while("taking the fingerprint of the weights"):
            self.trained = self.pool.describe()

    def _settled(self, past: Past | None) -> Config:
        """The settings with what has become of `auto`."""
        saved: str = self.config.save_dtype
        if saved == "auto":
            own = self.base.type_of(self.trained.tensors) or self.trained.live_dtype
            saved = own if past is None else past.journal.header.save_dtype
        return self.config.model_copy(update={"engine": self.trained.engine, "save_dtype": saved})

    def _shares(self) -> list[str]:
        return [key for key, task in self.evaluations.accuracies.items() if task.accuracy_is_share]

    def _shown_as_shares(self) -> list[str]:
        return [key for key in self.evaluations.accuracies if is_share(self.journal, key)]

    def _note_changes(self, past: Past) -> None:
        settings = self.config.model_dump(mode="json")
        journal = self.journal
        if other := {k: v for k, v in settings.items() if k != "model" and v != journal.settings.get(k, v)}:
            journal.append_settings(other)
        if other or not self.run.settings.is_file():
            self.run.write_settings(self.config)
        if past.files or past.code or self._accepted_prompts:
            journal.append_accepted(
                past.files or journal.files, past.code or journal.code, self._accepted_prompts or journal.prompts_hash
            )

    def _begin(
        self, path: Path, parent: Journal | None, code: dict[str, str], best_by: Sequence[str]
    ) -> tuple[RunDirectory, Journal]:
        """Make the run's directory and its journal. `parent` is the journal of the run that it starts from."""
        fingerprint = self.trained.fingerprint if parent is None else inherit(self.pool, self.trained, parent)
        header = make_header(
            self.config,
            self.trained,
            path,
            fingerprint,
            self.task.name,
            data_hash=self.task.data_hash(),
            code=code,
            best_by=list(best_by),
            shares=self._shares(),
            prompts_hash=self._prompts_hash,
        )
        run = RunDirectory.create(path)
        return run, Journal.create(run.path, header, parent)  # of two that begin here at once, one gets no further

    def _rebuild(self) -> None:
        """Bring the weights to the journal's last step."""
        refuse_other_weights(self.trained, self.journal, self.config.device)
        replay_all(self.pool, self.run, self.journal, self.base)

    def _catch_up(self) -> None:
        """Do what the run was about to do when it was cut off, and make again what it has lost of its checkpoints."""
        if self.strategy.displaced:
            self._whole_step()
        run = self.run
        journal = self.journal
        step = self.strategy.step
        if self._evaluation_is_due(step):
            self._evaluate(step)
        undone = step - 1 in journal.undone  # whose checkpoints are removed
        if step and not undone and self._due(step, self.config.save_steps) and step not in run.checkpoints():
            self._save_checkpoint(step)
        remake_lost(run, journal, self.base, step)

    def _loop(self, interrupted: Callable[[], bool]) -> str:
        asked_for: set[str] = set()
        while True:
            step = self.strategy.step
            last = self.config.steps
            if step < last and interrupted():
                return "interrupted"
            if self._evaluation_is_due(step):
                self._evaluate(step)
            if step >= last:
                return "finished"
            if self._patience_is_over() or self._stops_collapsed() or "stop" in asked_for | self._requests():
                return "stopped early"
            asked_for = self._whole_step()
            step = self.strategy.step
            if "evaluate" in asked_for:
                self._evaluate(step)
            if self._due(step, self.config.save_steps) or "save" in asked_for | self._requests():
                self._save_checkpoint(step)

    def _whole_step(self) -> set[str]:
        """Take a step, or what is left of two that make a sharpness-aware one; give what monitors ask for after it."""
        asked_for = set()
        while True:
            for monitor in self.monitors:
                monitor.on_step_begin(self.strategy.step + 1)
            self._step()
            asked_for |= self._requests()
            if not self.strategy.displaced:
                return asked_for

    def _requests(self) -> set[str]:
        return {request for monitor in self.monitors for request in monitor.requests()}

    def _evaluation_is_due(self, step: int) -> bool:
        config = self.config
        return step >= config.steps or (self._due(step, config.eval_steps) if step else config.eval_on_start)

    def _due(self, step: int, every: int) -> bool:
        """Whether a multiple of so many steps has come, which may be amid those that belong together."""
        return every > 0 and step // every > (step - self.config.steps_in_one) // every

    def _step(self) -> None:
        began = time.perf_counter()
        config = self.config
        step = self.strategy.step
        rate = self.strategy.learning_rate
        asked = self.asking.ask()
        self._begin_work("members", asked.prompt_ids, len(asked.members), asked.size)
        if config.max_staleness and not self._pauses(step + 1):
            self.asking.ask_ahead()
        in_order, staleness, times = asked.graded(self.grading, partial(self._heard, len(asked.members)))
        rewards = [g.grades.mean for g in in_order]
        fitness = self.judge.fitness(in_order)
        if all(r is None for r in rewards):
            raise EstuneError(
                f"step {step + 1}: no member has a reward, see the warnings; mend the reward, then resume with {ACCEPT}"
            )

        drift = self.pool.drift()
        start = time.perf_counter()
        update, fingerprint, look = self._applied(asked, in_order, fitness)
        times["update"] = time.perf_counter() - start
        metrics = self._metrics(step + 1, asked, in_order, drift)
        if look is not None:
            metrics |= look.metrics(taken_back=not any(update.coefficients))
            metrics["num_tokens"] += look.tokens
        if config.sam_rho:
            metrics["displaced"] = float(self.strategy.displaced)
        metrics["learning_rate"] = rate
        metrics["step_time"] = time.perf_counter() - began
        metrics["tokens_per_second"] = sum(g.tokens for g in in_order) / metrics["step_time"]
        if config.max_staleness:
            metrics["staleness"] = sum(staleness) / len(staleness)
        metrics |= {f"time/{key}": value for key, value in times.items()}
        kept = in_order[: config.log_completions]
        if kept:  # before the journal says that the step is done: a step cut off in between is taken again
            records = [r for member, g in enumerate(kept) for r in g.records(step=step + 1, member=member)]
            write_completions(self.run.completions(f"step-{step + 1:05d}"), records)
        record = StepRecord(
            update,
            rate,
            rewards,
            asked.indices,
            fingerprint,
            metrics,
            staleness,
            [] if fitness == rewards else fitness,
            self.strategy.state() | self.judge.state(),
        )
        self.journal.append_step(record)
        self.state.global_step = step + 1
        self.state.epoch = (step + 1) * len(asked.indices) / len(self.task.train)
        self._tell(lambda m: m.on_step_end(metrics, in_order[0].sample()))
        self._has_collapsed()

    def _applied(
        self, asked: Asked, in_order: Sequence[Graded], fitness: Sequence[float | None]
    ) -> tuple[Update, str, Look | None]:
        """Take a step, and take it back if it harms the base: its update, the fingerprint, and what was looked at."""
        # Members asked ahead of time were perturbed by the sigma of then.
        update = replace(self.strategy.tell(fitness), sigma=asked.sigma)
        fingerprint = self.pool.apply(update)
        guard = self.config.guard
        before = mean_reward(asked.of_base(in_order))
        if guard is None or before is None or not any(update.coefficients):
            return update, fingerprint, None
        look = Look.at(asked, in_order, before, self.pool, self.grading)
        if not look.harmed(guard):
            return update, fingerprint, look
        log.warning("step %d: %s: taken back", update.step + 1, look)
        replay_all(self.pool, self.run, self.journal, self.base, anew=True)
        update = self.strategy.take_back(update)
        return update, self.pool.apply(update), look

    def _metrics(self, step: int, asked: Asked, in_order: Sequence[Graded], drift: Drift | None) -> dict[str, float]:
        """What members came to in a step, the base apart."""
        metrics = {"step": step, **step_metrics(asked.of_perturbed(in_order)), "sigma": asked.sigma}
        if (reward := mean_reward(asked.of_base(in_order))) is not None:
            metrics["reward_base"] = reward
        if drift is not None:
            metrics |= {"weights/drift_changed": drift.changed, "weights/drift_rms": drift.rms}
        return metrics | {"num_tokens": self._tokens() + sum(g.tokens for g in in_order)}

    def _pauses(self, step: int) -> bool:
        """Whether all members have to be at their end after so many steps."""
        return self._evaluation_is_due(step) or self._due(step, self.config.save_steps)

    def _tokens(self) -> float:
        """Tokens generated by all steps so far."""
        return self.journal.steps[-1].metrics.get("num_tokens", 0) if self.journal.steps else 0

    def _evaluate(self, step: int) -> None:
        if not self.task.evaluation or any(e.step == step for e in self.journal.evaluations):
            return  # nothing to evaluate on, or the run was cut off after this evaluation, and goes on from here
        self.asking.drop_ahead()
        compare = self.pool.compare if self.config.compare_with_base else None
        metrics, graded = self.evaluations.evaluate(self.pool, step, self.run, self._begin_evaluation, compare=compare)
        best = self.journal.best
        best_by = self.journal.header.best_by
        if best is None or rank(metrics, best_by) > rank(best.metrics, best_by):
            self._save(self.run.best)
        write_completions(self.run.completions(f"evaluation-{step:05d}"), graded.records(step=step))
        record = EvaluationRecord(step, metrics)
        most = self.config.back_to_best if step < self.config.steps else None
        if best is not None and most is not None and falls_short(record, best, best_by, most):
            record = self._go_back(record, best.step)
        else:
            self.journal.append_evaluation(record)
        self._tell(lambda m: m.on_evaluate(metrics, graded.sample()))
        if record.back is not None:
            log.warning(
                "step %d: worse than after step %d: back to the weights there, half the learning rate",
                step,
                record.back,
            )
        over = step >= self.config.steps
        self._say("accuracy", remarks.never_right(self.task, self.journal.evaluations, over=over))
        self._has_collapsed()

    def _go_back(self, record: EvaluationRecord, step: int) -> EvaluationRecord:
        """Go on from the weights after an earlier step, with half the learning rate; the evaluation that says so."""
        for number in self.run.checkpoints():
            if number > step:
                remove(self.run.checkpoint(number))
        caution = self.strategy.state().get("caution", 1.0) / 2
        state = state_after(self.journal, step) | {"caution": caution}
        record = replace(record, back=step, state=state)
        self.journal.append_evaluation(record)
        replay_all(self.pool, self.run, self.journal, self.base, anew=True)
        recall(self.strategy, self.journal)
        self.judge = Judge(self.config, self.journal.state)
        return record

    def _begin_evaluation(self, name: str, prompts: Sequence[Sequence[int]]) -> None:
        self._begin_work(name, prompts, math.ceil(len(prompts) / EVALUATION_BATCH))

    def _begin_work(self, name: str, prompts: Sequence[Sequence[int]], pieces: int, times: int = 1) -> None:
        """Tell monitors what is generated from here on: completions of these prompts, so many of each."""
        before = self.pool.progress()
        work = Work(
            name=name,
            pieces=pieces,
            prompt_tokens=times * sum(map(len, prompts)),
            completions=times * len(prompts),
            places=times * len(prompts) * self.config.max_new_tokens,
            engines=self.pool.engines,
            done=lambda: self.pool.progress().since(before),
        )
        self._tell(lambda m: m.on_generate_begin(work))

    def _say(self, what: str, remark: str | None) -> None:
        """Log a remark, if there is one, and none of its kind was made before."""
        if remark is not None and what not in self._said:
            self._said.add(what)
            log.warning("%s", remark)

    def _has_collapsed(self) -> bool:
        """Whether the run has collapsed, of which each sign is said once."""
        found = remarks.collapse(self.journal.steps, self.journal.evaluations)
        for kind, remark in found.items():
            self._say(kind, remark)
        return bool(found)

    def _stops_collapsed(self) -> bool:
        """Whether the run is to end, as it has collapsed: by journal and settings alone, so that resuming agrees."""
        if not self.config.stop_on_collapse or not self._has_collapsed():
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

    def _save(self, path: Path, dtype: str | None = None) -> None:
        self.pool.save(path, dtype or self.journal.header.save_dtype)

    def _save_checkpoint(self, step: int) -> None:
        self.asking.drop_ahead()
        self._save(self.run.checkpoint(step), self.trained.dtype)
        self._tell(lambda m: m.on_save(step))

    def plan(self) -> Plan:
        """What the run sets out to do."""
        return Plan(
            run=self.run.path,
            model=self.config.model,
            parameters=self.trained.elements,
            task=self.task.name,
            steps=self.config.steps,
            first_step=self.strategy.step,
            population=self.config.members,
            prompts_per_step=self.order.per_step // self.config.prompt_groups * self.config.samples_per_prompt,
            prompt_tokens=self._prompt_tokens,
            engines=self.pool.engines,
            train_size=len(self.task.train),
            eval_size=len(self.task.evaluation),
            config=self.config.model_dump(mode="json"),
            history=[event.metrics for event in self.journal.chronicle()],
            shares=self._shown_as_shares(),
        )

    def _summary(self, ended: str, seconds: float) -> Summary:
        evaluations = self.journal.evaluations
        best = self.journal.best
        return Summary(
            run=self.run.path,
            steps=self.strategy.step,
            seconds=seconds,
            before=evaluations[0].metrics if evaluations else {},
            after=evaluations[-1].metrics if evaluations else {},
            best=best.metrics if best else {},
            ended=ended,
            shares=self._shown_as_shares(),
            go_on=self.journal.go_on,
            taken_back=sum(step.metrics.get("taken_back", 0) > 0 for step in self.journal.steps),
            back=sum(evaluation.back is not None for evaluation in evaluations),
        )

    def _heard(self, members: int, done: int) -> None:
        self._tell(lambda m: m.on_member_end(done, members))

    def _tell(self, call: Callable[[Monitor], None]) -> None:
        for monitor in self.monitors:
            call(monitor)

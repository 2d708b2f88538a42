"""Callbacks as transformers' and TRL's users know them, called by one of estune's monitors.

A callback is any object with some of the methods of `transformers.TrainerCallback`, called as there, as
`on_step_end(args, state, control, **kwargs)`. There is no optimizer and no dataloader: these are None, and so is
`model`, since the weights in memory are mostly some member's; `ESTrainer.save_model` writes the trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState

from estune.files import remove
from estune.journal.records import rank
from estune.run.directory import RunDirectory
from estune.run.monitors.base import Metrics, Monitor, Plan, Request, Sample, Summary

_LATEST = ("step", "learning_rate", "num_tokens")  # the others are averaged over the steps of one log, as in TRL


class CallbackMonitor(Monitor):
    """Calls callbacks when something happens, and keeps `state` and `control` for them.

    Args:
        args: the settings, an `ESConfig`.
        processing_class: the tokenizer, passed on.
    """

    def __init__(self, args: Any, processing_class: Any = None) -> None:
        self.args = args
        self.processing_class = processing_class
        self.callbacks: list[Any] = []
        self.state = TrainerState()
        self.control = TrainerControl()
        self.train_metrics: dict[str, float] = {}
        self._epochs_per_step = 0.0
        self._first_step = self._samples_per_step = 0
        self._recent: list[Metrics] = []
        self._run = Path()
        self._best: tuple[float, ...] = (-math.inf,)

    def fire(self, event: str, **more: Any) -> None:
        """Call every callback that has a method of this name; a control that one returns replaces the old one."""
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                returned = handler(
                    self.args,
                    self.state,
                    self.control,
                    model=None,
                    processing_class=self.processing_class,
                    optimizer=None,
                    lr_scheduler=None,
                    train_dataloader=None,
                    eval_dataloader=None,
                    **more,
                )
                self.control = returned or self.control

    def _restore(self, history: Iterable[Metrics]) -> None:
        """Take in the metrics from before the run was resumed, without calling callbacks."""
        for metrics in history:
            self._at(int(metrics["step"]))
            if _is_evaluation(metrics):
                self._keep(metrics)
                self._judge(metrics)
            else:
                self._recent.append(metrics)
                if self._log_is_due():
                    self._keep(self._averages())

    def _begin(self, plan: Plan) -> None:
        self.state = TrainerState()
        self.control = TrainerControl()
        self._recent = []
        self._run = plan.run
        self._best = (-math.inf,)
        self._epochs_per_step = plan.prompts_per_step / plan.train_size
        self._first_step = plan.first_step
        self._samples_per_step = plan.population * plan.prompts_per_step
        self.state.max_steps = plan.steps
        self.state.logging_steps = self.args.logging_steps
        self.state.eval_steps = plan.config["eval_steps"]
        self.state.save_steps = plan.config["save_steps"]
        self.state.num_train_epochs = plan.steps * self._epochs_per_step
        self.state.train_batch_size = plan.prompts_per_step

    def on_train_begin(self, plan: Plan) -> None:
        """As `Monitor.on_train_begin`."""
        self._begin(plan)
        self._restore(plan.history)
        self._at(plan.first_step)
        self.fire("on_train_begin")

    def on_step_begin(self, step: int) -> None:
        """As `Monitor.on_step_begin`; what was asked for at the last step has been done by then."""
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.fire("on_step_begin")

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """As `Monitor.on_step_end`."""
        self._at(int(metrics["step"]))
        self._recent.append(metrics)
        self.fire("on_step_end")
        if self.control.should_log or self._log_is_due():
            self._log(self._averages())

    def on_evaluate(self, metrics: Metrics, sample: Sample | None = None) -> None:
        """As `Monitor.on_evaluate`. As in transformers, the best metric does not count this evaluation yet."""
        self.control.should_evaluate = False
        self._log(metrics)
        self.fire("on_evaluate", metrics={**self._plain(metrics), "epoch": self.state.epoch})
        self._judge(metrics)

    def on_save(self, step: int) -> None:
        """As `Monitor.on_save`; if their number is limited, the oldest checkpoints are removed."""
        self.control.should_save = False
        run = RunDirectory(self._run)
        if most := self.args.save_total_limit:
            for old in run.checkpoints()[most:]:
                remove(run.checkpoint(old))
        self.fire("on_save")

    def requests(self) -> set[Request]:
        """As `Monitor.requests`."""
        control = self.control
        asked: dict[Request, bool] = {
            "stop": control.should_training_stop,
            "evaluate": control.should_evaluate,
            "save": control.should_save,
        }
        return {request for request, wanted in asked.items() if wanted}

    def on_train_end(self, summary: Summary) -> None:
        """As `Monitor.on_train_end`; before it, the results of the whole run are logged."""
        if self._recent:
            self._log(self._averages())
        steps = summary.steps - self._first_step
        self.train_metrics = {
            "train_runtime": summary.seconds,
            "train_samples_per_second": steps * self._samples_per_step / summary.seconds,
            "train_steps_per_second": steps / summary.seconds,
            "epoch": self.state.epoch,
        }
        self._log(self.train_metrics)
        self.fire("on_train_end")

    def _at(self, step: int) -> None:
        self.state.global_step = step
        self.state.epoch = step * self._epochs_per_step

    def _log_is_due(self) -> bool:
        step = self.state.global_step
        every = self.args.logging_steps
        if self.args.logging_strategy == "no":
            return False
        if self.args.logging_strategy == "epoch":
            return bool(math.floor(self.state.epoch) > math.floor((step - 1) * self._epochs_per_step))
        every = max(1, round(every * self.state.max_steps)) if 0 < every < 1 else max(1, every)
        return bool(step % every == 0 or (step == 1 and self.args.logging_first_step))

    def _averages(self) -> Metrics:
        """Means of the metrics of the steps since the last log."""
        recent = self._recent
        self._recent = []
        columns = {key: [m[key] for m in recent if key in m] for key in dict.fromkeys(k for m in recent for k in m)}
        return {key: v[-1] if key in _LATEST or len(v) == 1 else sum(v) / len(v) for key, v in columns.items()}

    def _log(self, metrics: Metrics) -> None:
        self.control.should_log = False
        self.fire("on_log", logs=self._keep(metrics))

    def _keep(self, metrics: Metrics) -> dict[str, float]:
        """Append to the history; return what callbacks are told, which leaves out the step."""
        logs = {**self._plain(metrics), "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        return logs

    def _plain(self, metrics: Metrics) -> dict[str, float]:
        return {key: value for key, value in metrics.items() if key != "step"}

    def _judge(self, metrics: Metrics) -> None:
        """Note whether this is the best evaluation so far."""
        found = rank(metrics, self.args.best_by)
        if found > self._best:
            self._best = found
            self.state.best_metric = found[0] if self.args.greater_is_better else -found[0]
            self.state.best_global_step = self.state.global_step
            self.state.best_model_checkpoint = str(self._run / "best")


def _is_evaluation(metrics: Metrics) -> bool:
    return any(key.startswith("eval_") for key in metrics)

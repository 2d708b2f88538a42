"""A trainer with the face of TRL's `GRPOTrainer` (TRL 1.16) and Evolution Strategies behind it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from estune.config import RESUMABLE, Config
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.files import make_temporary, remove, remove_temporary, replacing
from estune.grading.convention import reward_name
from estune.grading.isolation import refuse_grader
from estune.journal.journal import FILE, Journal
from estune.pool.open import open_to_generate, with_resources_to_generate
from estune.run.card import Card
from estune.run.directory import BASE, RunDirectory, default_path, refuse_used
from estune.run.held_out import HeldOut
from estune.run.hub import upload
from estune.run.monitors import default_monitors
from estune.run.monitors.base import Monitor
from estune.run.monitors.console import ConsoleMonitor
from estune.run.recorded import settings_of
from estune.run.trainer import Trainer
from estune.tasks.base import Task
from estune.trl.callbacks import CallbackMonitor
from estune.trl.config import ESConfig
from estune.trl.inputs import (
    EVAL_SET,
    accuracy_name,
    as_evaluation_rows,
    as_rewards,
    as_rows,
    has_other_tokenizer,
    link_model,
    tokenizer_of,
)
from estune.weights.locate import locate

log = logging.getLogger(__name__)

RESUME = "trainer.train(resume_from_checkpoint={text})"  # what a user does to go on with a run
_REFUSED = {
    "optimizers": "there is no optimizer: the update is the method",
    "peft_config": "give adapter in the settings instead: adapter={'rank': 8}",
    "quantization_config": "weights that are trained are not quantised",
    "tools": "completions are single turns",
    "rollout_func": "estune's engines generate",
    "environment_factory": "completions are single turns",
}


class ESTrainer:
    """Fine-tunes all weights of a model by the rewards of its completions.

    Args:
        model: a hub id, a directory, `tiny`, or a transformers model in memory, which is saved beside the run, in
            `OUTPUT_DIR/base`.
        reward_funcs: one or several functions of TRL's signature, reward models, or names of either.
        args: the settings.
        train_dataset: a `datasets.Dataset` or rows, with a column `prompt`; the others go to the rewards.
        eval_dataset: the same, or a dict of sets, whose accuracies are `eval_accuracy/NAME`; None for no evaluation.
        processing_class: the tokenizer, or the processor of a model that sees, if not the model's own; kept in
            `OUTPUT_DIR/base` with links to the model.
        reward_processing_classes: tokenizers of the reward models among `reward_funcs`, None for the others.
        callbacks: objects or classes with methods of `transformers.TrainerCallback`.
        reward_weights: one for each reward function, by default 1; they are also a setting.
        others: further arguments of `GRPOTrainer`, which are refused with the reason.

    Raises:
        EstuneError: for settings, data or rewards that cannot be trained with, before anything is written.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ESConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        reward_weights: Sequence[float] | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            if name not in _REFUSED:
                raise EstuneError(f"ESTrainer has no argument {name}; see docs/trl.md for those it has")
            if value not in (None, (None, None), [], ()):
                raise EstuneError(f"ESTrainer: {name} cannot be used ({_REFUSED[name]}); leave it out")
        args = ESConfig() if args is None else args
        if not isinstance(args, ESConfig):
            raise EstuneError(f"ESTrainer: args is {type(args).__name__}; give an ESConfig")
        self.args = args = copy(args)  # what becomes of it here is not the caller's
        if hasattr(model, "peft_config"):
            raise EstuneError(
                "ESTrainer: the model has adapters, and all weights are trained: merge_and_unload() first"
            )
        self.model = model
        self.processing_class = processing_class
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        functions = as_rewards(reward_funcs, reward_processing_classes)
        names = [reward_name(function) for function in functions]
        evaluation = [] if args.eval_strategy == "no" else as_evaluation_rows(eval_dataset)
        if not evaluation and args.eval_strategy not in (None, "no"):
            raise EstuneError(f"ESTrainer: eval_strategy is {args.eval_strategy!r}; give an eval_dataset")
        weights = reward_weights if reward_weights is not None else args.reward_weights
        self.task = Task(
            name="-".join(names),
            train=as_rows(train_dataset, "train_dataset"),
            evaluation=evaluation,
            reward_funcs=functions,
            reward_weights=[1.0] * len(names) if weights is None else list(weights),
            accuracy=accuracy_name(names, args.metric_for_best_model) if evaluation else None,
            group=EVAL_SET if isinstance(eval_dataset, Mapping) else None,
        )
        source = model if isinstance(model, str) else getattr(model.config, "name_or_path", "") or "model"
        config = args.build(source, len(self.task.train))
        self.config = config.model_copy(
            update={"output_dir": config.output_dir or default_path(config, self.task.name)}
        )
        args.eval_strategy = "steps" if evaluation else "no"
        args.output_dir = str(self.config.output_dir)
        self._run: Trainer | None = None
        self._saved: Path | None = None
        self._told = CallbackMonitor(args, processing_class)
        for callback in callbacks or ():
            self.add_callback(callback)
        self._told.fire("on_init_end")

    @property
    def state(self) -> Any:
        """transformers' `TrainerState`: `global_step`, `log_history`, `best_metric` and the like."""
        return self._told.state

    @property
    def control(self) -> Any:
        """transformers' `TrainerControl`, by which callbacks ask to stop, evaluate, save or log."""
        return self._told.control

    @property
    def directory(self) -> RunDirectory:
        """The run's directory."""
        assert self.config.output_dir is not None
        return RunDirectory(self.config.output_dir)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or one of this class."""
        self._told.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop_callback(self, callback: Any) -> Any:
        """Take out and return a callback, or the first of this class; None where there is none."""
        for found in self._told.callbacks:
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                self._told.callbacks.remove(found)
                return found
        return None

    remove_callback = pop_callback

    def is_world_process_zero(self) -> bool:
        """True: other processes only generate."""
        return True

    def train(self, resume_from_checkpoint: bool | str | Path | None = None, *, accept_changes: bool = False) -> Any:
        """Train, from the beginning or where an earlier run ended.

        Args:
            resume_from_checkpoint: True for the run in `output_dir`, or a run's directory, or a checkpoint in it. A run
                goes on where its journal ends, whichever checkpoint is named.
            accept_changes: go on although reward functions, configuration or tokenizer are no longer the same.

        Returns:
            transformers' `TrainOutput`. There is no loss: `training_loss` is NaN.

        Raises:
            EstuneError: as `Trainer` and `Trainer.resume`.
        """
        refuse_grader()
        if resume_from_checkpoint:
            given = None if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            run = self._resume(given, accept_changes=accept_changes)
        else:
            refuse_used(self.directory.path, RESUME)
            config = self.config.model_copy(update={"model": self._base()})
            run = Trainer(config, task=self.task, monitors=self._monitors, best_by=self.args.best_by, go_on=RESUME)
        self.config = self.config.model_copy(update={"template_date": run.config.template_date})
        try:
            self._run = run
            summary = run.train()
        finally:
            self._run = None
        if self.args.push_to_hub:
            self.push_to_hub()
        return TrainOutput(summary.steps, float("nan"), self._told.train_metrics)

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of the trained weights, or of the model before it is trained, on the evaluation set or another.

        Raises:
            EstuneError: there is no evaluation set, or the run has not ended.
        """
        self._refuse_running("evaluate", "set control.should_evaluate")
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = as_evaluation_rows(given)
        if not rows:
            raise EstuneError("ESTrainer.evaluate: no rows; give eval_dataset, to the trainer or here")
        names = [reward_name(function) for function in self.task.reward_funcs]
        task = Task(
            name=self.task.name,
            train=[{"prompt": ""}],  # so that what was trained on can be evaluated too
            evaluation=rows,
            reward_funcs=self.task.reward_funcs,
            reward_weights=self.task.reward_weights,
            accuracy=accuracy_name(names, self.args.metric_for_best_model),
            group=EVAL_SET if isinstance(given, Mapping) else None,
        )
        config = self.config.model_copy(update={"model": str(self._trained() or self._base()), "workers": None})
        if (self.directory.path / FILE).is_file():  # prompts are those that it was trained on, whatever day it is
            began = settings_of(Journal.read(self.directory.path)).get("template_date")
            config = config.model_copy(update={"template_date": date.fromisoformat(began) if began else None})
        config = with_resources_to_generate(config)
        with ExitStack() as opened:
            held_out = HeldOut(task, config, open_encoder(config))
            opened.callback(held_out.close)
            pool = open_to_generate(config, held_out.longest)
            opened.callback(pool.close)
            found, _ = held_out.evaluate(pool)
        metrics = {f"{metric_key_prefix}_{key.removeprefix('eval_')}": value for key, value in found.items()}
        self._told.on_evaluate(metrics)
        return {**metrics, "epoch": self.state.epoch}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the weights as a Hugging Face checkpoint: the final ones, or the best with `load_best_model_at_end`.

        Args:
            output_dir: a directory, which may hold other files; the run's own by default. In a callback, it gets the
                weights of that moment.
        """
        target = Path(output_dir or self.directory.path)
        if self._run is not None:
            now = target / ".model.tmp"
            self._run.pool.save(now, self._run.journal.header.save_dtype)
            _copy(now, target)
            remove(now)
            return
        _copy(self._trained() or locate(self._base()), target)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        *,
        token: str | None = None,
        revision: str | None = None,
        dataset_name: str | None = None,
        **_: Any,
    ) -> str:
        """Upload what `save_model` writes, with a model card.

        Args:
            repo_id: the model's name on the hub; the setting `hub_model_id` by default, else that of `output_dir`.
            commit_message, token, revision: as `huggingface_hub` takes them; the last two also from the settings.
            dataset_name: for the card.

        Returns:
            The commit's address.

        Raises:
            EstuneError: the hub cannot be reached, or refuses.
        """
        self._refuse_running("push_to_hub", "wait for its end")
        name = repo_id or self.args.hub_model_id or self.directory.path.name
        folder = make_temporary("hub")
        try:
            self.save_model(folder)
            self._card(name, dataset_name).write(folder)
            return upload(
                folder,
                name,
                commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                private=self.args.hub_private_repo,
            )
        finally:
            remove_temporary(folder)

    def model_card(self, name: str, dataset_name: str | None = None) -> str:
        """A model card for the hub: what was trained, on what, with which settings and to what end.

        Raises:
            EstuneError: there is no run yet.
        """
        return self._card(name, dataset_name).text()

    def _card(self, name: str, dataset_name: str | None) -> Card:
        """The card of the trained model."""
        journal = Journal.read(self.directory.path)
        best = journal.best if self.args.load_best_model_at_end else None
        step = len(journal.steps) if best is None else best.step
        return Card(journal, name, step, len(self.task.evaluation), dataset_name)

    def _monitors(self, run: RunDirectory, config: Config) -> list[Monitor]:
        """The usual monitors, and that of the callbacks."""
        usual = default_monitors(run, config)
        if self.args.disable_tqdm:
            usual = [monitor for monitor in usual if not isinstance(monitor, ConsoleMonitor)]
        return [*usual, self._told]

    def _refuse_running(self, what: str, instead: str) -> None:
        if self._run is not None:
            raise EstuneError(f"ESTrainer.{what}: the run is going on; {instead}")

    def _trained(self) -> Path | None:
        """The checkpoint that stands for the trained model, if there is one."""
        best = [self.directory.best] if self.args.load_best_model_at_end else []
        return next((path for path in (*best, self.directory.final) if path.is_dir()), None)

    def _base(self) -> str:
        """The model's name for a run. A model in memory, or one with another tokenizer, is saved first."""
        output = self.directory.path
        model = self.model
        tokenizer = self.processing_class
        trust = bool(self.args.settings().get("trust_remote_code"))
        is_other = partial(has_other_tokenizer, tokenizer=tokenizer, trust_remote_code=trust)
        if isinstance(model, str) and (tokenizer is None or not is_other(locate(model))):
            return model
        base = output / BASE
        if base.is_dir() and ((output / FILE).is_file() or base == self._saved):  # a run was trained over it
            if tokenizer is not None and is_other(base):
                raise EstuneError(
                    f"ESTrainer: processing_class is not the tokenizer that the run in {output} began with, which "
                    f"is in {base}: leave it out, or give another output_dir"
                )
            return str(base)
        tokenizer = tokenizer or tokenizer_of(model, trust_remote_code=trust)
        with replacing(base) as folder:
            if isinstance(model, str):
                link_model(locate(model), folder, tokenizer)
            else:
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        self._saved = base
        return str(base)

    def _resume(self, given: Path | None, *, accept_changes: bool) -> Trainer:
        """The run to go on with, which keeps its settings."""
        if given is not None:
            inside = not (given / FILE).is_file() and (given.parent / FILE).is_file()
            self.config = self.config.model_copy(update={"output_dir": given.parent if inside else given})
        changed = {key: getattr(self.config, key) for key in RESUMABLE if key in self.args.settings()}
        changed |= {"model": self._base(), "steps": self.config.steps}
        run = Trainer.resume(
            self.directory.path,
            task=self.task,
            monitors=self._monitors,
            accept_changes=accept_changes,
            go_on=RESUME,
            **changed,
        )
        own = {*RESUMABLE, "task", "output_dir", "device", "replicas", "threads", "batch_size", "template_date"}
        own.update(key for key, value in self.config if value == "auto")  # which asks for none
        here, there = (c.model_dump(exclude=own) for c in (self.config, run.config))
        if other := [key for key in here if here[key] != there[key]]:
            log.warning("%s keeps its settings: not used here are %s", self.directory.path, ", ".join(other))
        return run


def _copy(folder: Path, target: Path) -> None:
    """Copy a checkpoint's files, each whole or not at all, into a directory that may hold others."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with replacing(target / file.relative_to(folder)) as copy:
                shutil.copyfile(file, copy)

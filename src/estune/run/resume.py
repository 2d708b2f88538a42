"""A run that is to go on: its journal, cleared of what a kill left, and with which settings and on which task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.charts.words import amount
from estune.config import RESUMABLE, Config, parse
from estune.errors import ACCEPT, EstuneError
from estune.files import clear_leftovers
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.journal.replay import holds, refuse_changed_model
from estune.pool.base import Description, Pool
from estune.pool.waiting import check_model
from estune.run.directory import RunDirectory
from estune.run.evaluations import Evaluations
from estune.run.make import settled
from estune.run.recorded import RESUME_FROM_PYTHON, settings_of, task_folder, task_of
from estune.run.standing import Standing
from estune.tasks.base import Task
from estune.versions import packages
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import hub_name


@dataclass
class Past:
    """A run that is to go on: what it was, and with which settings and on which task it goes on.

    It has what `NewRun` has, which is one that is to begin.
    """

    run: RunDirectory
    journal: Journal  # open for writing
    base: Checkpoint
    config: Config
    task: Task
    files: dict[str, str]  # hashes of the model's files, where they are others than before and the user accepts them
    code: dict[str, str]  # of the task's code, likewise
    accept_changes: bool = False
    folder: Path = Path()  # that paths in the task's settings are relative to
    prompts_hash: str | None = None  # of what the model is shown, where that is another and the user accepts it

    @property
    def live_dtype(self) -> str:
        """Type of the live weights."""
        return self.journal.header.live_dtype

    @property
    def steps(self) -> int:
        """Steps that have been taken."""
        return len(self.journal.steps)

    def check(self, evaluations: Evaluations, prompts_hash: str) -> None:
        """See that prompts are those that the run began with.

        Raises:
            EstuneError: they are others, and the user does not accept that.
        """
        self.prompts_hash = refuse_changed_prompts(self.journal, prompts_hash, accept=self.accept_changes)

    def open(self, config: Config, pool: Pool, trained: Description) -> Standing:
        """Bring the weights to the journal's last step.

        Args:
            config: the settings; `trained` tells the engine that they leave open.
            pool: has the weights.
            trained: what it trains.

        Raises:
            EstuneError: they are not the run's.
        """
        refuse_other_weights(trained, self.journal, config.device)
        config = settled(config, trained, self.journal.header.save_dtype)
        standing = Standing(config, self.run, self.journal, self.base, pool)
        standing.rebuild()
        return standing

    def begun(self, config: Config) -> None:
        """Write down what is no longer as it was."""
        journal = self.journal
        settings = config.model_dump(mode="json")
        if other := {k: v for k, v in settings.items() if k != "model" and v != journal.settings.get(k, v)}:
            journal.append_settings(other)
        if other or not self.run.settings.is_file():
            self.run.write_settings(config)
        if self.files or self.code or self.prompts_hash:
            journal.append_accepted(
                self.files or journal.files, self.code or journal.code, self.prompts_hash or journal.prompts_hash
            )

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()


def reopen(
    path: Path, changed: Mapping[str, Any], *, task: Task | None, accept_changes: bool, trust_task: bool
) -> Past:
    """Open a run to go on with it, cleared of what a kill may have left in it.

    Args:
        path: the run's directory.
        changed, task, accept_changes, trust_task: as `Trainer.resume` takes them.

    Raises:
        EstuneError: as `Trainer.resume`, as far as can be told before a model is loaded.
    """
    run = RunDirectory(path)
    journal = Journal.resume(path)
    try:
        config = resumed(journal, changed)
        done = len(journal.steps)
        check_model(config.model)
        insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
        task, code = task_of(journal, config, changed, RESUME_FROM_PYTHON, task=task, **insists)
        base = base_checkpoint(journal.header, config.model)
        files = refuse_changed_model(journal, base.path, accept=accept_changes)
        clear_leftovers(path)
        clear_leftovers(path / "completions")
        if config.steps <= done and _is_whole(run, journal, base):
            raise EstuneError(f"{path} is done after {amount(done, 'steps')}; give --steps above {done} to go on")
    except BaseException:
        journal.close()
        raise
    return Past(run, journal, base, config, task, files, code, accept_changes, task_folder(journal, config, changed))


def _is_whole(run: RunDirectory, journal: Journal, base: Checkpoint) -> bool:
    """Whether a run that took all its steps says so and has what it ends with."""
    dtype = journal.header.save_dtype
    done = len(journal.steps)
    return (
        (journal.ended is not None or journal.header.format == 1)
        and holds(run.final, base, journal, dtype, done)
        and (not journal.evaluations or holds(run.best, base, journal, dtype))
    )


def resumed(journal: Journal, changed: Mapping[str, Any]) -> Config:
    """The settings to go on with: the run's, with those of `RESUMABLE` that are to change.

    Raises:
        EstuneError: for another setting, or a bad value.
    """
    other = next((key for key in changed if key not in RESUMABLE), None)
    if other is not None:
        if other not in Config.model_fields:
            parse({other: changed[other]}, str(journal.path))  # which says what it is called here
        raise EstuneError(
            f"--resume keeps the run's settings, found {other}; `estune branch` goes on with others, and here only "
            f"{', '.join(RESUMABLE)} may change"
        )
    settings = {**settings_of(journal), "model": journal.base_model(), **changed}
    name, commit = hub_name(str(journal.settings.get("model")))
    if commit and changed.get("model") == name and not Path(name).exists():
        settings["model"] = f"{name}@{commit}"  # the one that the run began with
    if "workers" in changed or "workers_at" in changed:
        settings["replicas"] = None  # as many as there is room for beside workers, or instead of them
    if changed.get("workers_at"):
        settings |= {"workers": None, "workers_per_gpu": 1, "ray_address": None}
    return parse(settings, str(journal.path))


def refuse_other_weights(trained: Description, journal: Journal, device: str) -> None:
    """Refuse to go on with a run where the base model, what of it is trained, or the live weights' type is another.

    Args:
        trained: what the pool trains.
        journal: the run's.
        device: that the settings name.
    """
    header = journal.header
    if trained.base_hash != header.base_hash:
        raise EstuneError(
            f"{journal.run}: workers have another base model, {trained.base_hash}, than the run began with, "
            f"{header.base_hash}; put the original where they load it from"
        )
    if other := sorted(trained.tensors.keys() ^ header.tensors.keys()):
        does = "trains" if other[0] in header.tensors else "does not train"
        raise EstuneError(
            f"{journal.run}: the run {does} {other[0]}, and here train_parameters="
            f"{journal.settings.get('train_parameters')} means otherwise; resume it with the estune that it began with"
        )
    if trained.live_dtype != header.live_dtype:
        raise EstuneError(
            f"{journal.run}: the run generates with {header.live_dtype} weights, which here, on {device}, "
            f"are loaded as {trained.live_dtype}; resume it on the kind of device that it began on"
        )


def refuse_changed_prompts(journal: Journal, now: str, *, accept: bool) -> str | None:
    """Refuse prompts that are not, token for token, those that a run began with.

    Args:
        journal: the run's; one without a hash of its prompts is not compared.
        now: the hash of what they are here.
        accept: the user insists on going on.

    Returns:
        The hash to record, if they are others and the user accepts them; None otherwise.

    Raises:
        EstuneError: they are others, with the libraries of which the run had other versions.
    """
    if journal.prompts_hash in ("", now):
        return None
    if not accept:
        before = journal.header.packages
        other = ", ".join(f"{name} {before[name]}" for name, v in packages().items() if before.get(name, v) != v)
        raise EstuneError(
            f"{journal.run}: its prompts come to other tokens here than when the run began, though data, "
            f"tokenizer and chat template are the same; take the libraries that it began with"
            f"{f' ({other})' if other else ''}, or go on with what is there now by {ACCEPT}"
        )
    return now

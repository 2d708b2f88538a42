"""What begins a run: settings that go together, a directory, and a journal, which may go on from another run's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from estune.charts.words import amount
from estune.config import Config
from estune.errors import EstuneError
from estune.grading.level import refuse_level
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.pool.base import Description, Pool
from estune.pool.waiting import check_model
from estune.run.code import code_of
from estune.run.directory import RunDirectory, default_path, refuse_used
from estune.run.evaluations import Evaluations
from estune.run.held_out import refuse_unreachable
from estune.run.make import make_header, make_task, settled
from estune.run.metric_names import of_evaluation, refuse_unknown_best, refuse_unknown_constraint
from estune.run.standing import Standing
from estune.run.trust import remember
from estune.tasks.base import Task
from estune.weights.adapted import open_checkpoint
from estune.weights.moments import has_moments
from estune.weights.parameters import AUTO
from estune.weights.policies import POLICIES, bits_of


class NewRun:
    """A run that is to begin; `Past` is one that goes on.

    Args:
        config: the settings.
        task: a task of the user's own; by default the one the settings name.
        best_by: metrics that tell which evaluation is the best.
        go_on: what the user does to go on with a run, as `going_on` takes it.

    Raises:
        EstuneError: the directory is in use, or there is no such run to start from.

    Attributes:
        live_dtype: type of the live weights, if it is settled.
        steps: that have been taken.
        folder: from which files of watched tasks are named.
    """

    live_dtype: str | None = None
    steps = 0

    def __init__(self, config: Config, task: Task | None, best_by: Sequence[str], go_on: str) -> None:
        check_model(config.model)
        self._named = config.task if task is None else None
        self._best_by = list(best_by)
        self.task = task or make_task(config)
        self._path = config.output_dir or default_path(config, self.task.name)
        refuse_used(self._path, go_on)
        self._parent = parent_of(config)
        self.config = following(config, self._parent)
        self.folder = Path.cwd()
        self._journal: Journal | None = None
        self._run: RunDirectory | None = None  # while it may have to go

    def check(self, evaluations: Evaluations, prompts_hash: str) -> None:
        """See that evaluations have a metric that tells the best.

        Args:
            evaluations: what the run evaluates.
            prompts_hash: of what the model is shown, as `hash_of_prompts` gives it.

        Raises:
            EstuneError: they have none.
        """
        if self.task.evaluation:
            watched = {name: each.task for name, each in evaluations.watched.items()}
            refuse_unknown_best(self._best_by, of_evaluation(self.task, self.config, watched))
        self._shares = [key for key, task in evaluations.accuracies.items() if task.accuracy_is_share]
        self._prompts_hash = prompts_hash

    def open(self, config: Config, pool: Pool, trained: Description) -> Standing:
        """Make the run's directory and its journal.

        Args:
            config: the settings; `trained` tells the engine and the types that they leave open.
            pool: has the weights; a run that starts from another brings them to where that one ended.
            trained: what it trains.

        Raises:
            EstuneError: the other run's steps lead elsewhere here, or the directory has come into use.
        """
        base = open_checkpoint(config.model, config.adapter)
        config = settled(config, trained, base.type_of(trained.tensors) or trained.live_dtype)
        header = make_header(
            config,
            trained,
            self._path,
            trained.fingerprint if self._parent is None else inherit(pool, trained, self._parent),
            self.task.name,
            data_hash=self.task.data_hash(),
            code=code_of(self.task.reward_funcs, self._named),
            best_by=self._best_by,
            shares=self._shares,
            prompts_hash=self._prompts_hash,
        )
        run = RunDirectory.create(self._path)
        self._journal = Journal.create(run.path, header, self._parent)  # of two that begin at once, one gets no further
        self._run = run
        run.write_settings(config)
        return Standing(config, run, self._journal, base, pool)

    def begun(self, config: Config) -> None:
        """Let the run stay: all that it needs is there."""
        remember(config)
        self._run = None

    def close(self) -> None:
        """Close the journal; a run that could not begin goes, so that the same command can be given again."""
        if self._journal is not None:
            self._journal.close()
        if self._run is not None:
            self._run.discard()


def refuse_unfit(config: Config, task: Task) -> None:
    """Refuse settings that do not go together with a task.

    Raises:
        EstuneError: naming the setting.
    """
    refuse_unreachable(task, config)
    refuse_unknown_constraint(config, task)
    if task.rollout is not None and config.noise_rank and not config.device.startswith("cpu"):
        POLICIES[config.weights].refuse_low_rank()
    if config.prompt_groups > 1:
        refuse_level(task.reward_funcs, "prompt_groups", "groups of members have other prompts", "population")


def parent_of(config: Config) -> Journal | None:
    """The journal of the run that a new run is to go on from.

    Raises:
        EstuneError: where that run kept its weights in another way: its steps would not give the same weights here.
    """
    if config.start_from is None:
        if config.start_step is not None:
            raise EstuneError(f"start_step is {config.start_step}, and no start_from says of which run: give it, too")
        return None
    parent = Journal.read(config.start_from, config.start_step)
    if config.start_step is None:
        parent.warn_of_shortfall()
    for key in ("weights", "rounding", "noise", "sigma_scale", "train_parameters"):
        theirs = parent.settings.get(key, {} if key == "sigma_scale" else None)
        everything = key == "train_parameters" and {theirs, config.train_parameters} == {"*", AUTO}  # of a text model
        alike = key == "weights" and bits_of(parent.header.policy) == bits_of(config.weights)
        follows = key == "noise" and config.noise == "auto"
        if theirs != getattr(config, key) and not everything and not alike and not follows:
            raise EstuneError(
                f"start_from {config.start_from} was run with {key}={theirs}, found {getattr(config, key)}: set "
                f"{key}={theirs}"
            )
    if has_moments(record.update for record in parent.history) and not config.adam:
        raise EstuneError(f"start_from {config.start_from} was run with adam, and its moments go on: set adam=true")
    if parent.settings.get("sam_rho") and len(parent.steps) % 2:
        raise EstuneError(
            f"start_from {config.start_from}: after step {len(parent.steps)} its weights are amid a sharpness-aware "
            f"step: give start_step {len(parent.steps) - 1}, say"
        )
    base_checkpoint(parent.header, config.model)
    return parent


def following(config: Config, parent: Journal | None) -> Config:
    """Settings whose noise is that of the run that goes before, if there is one, where they leave it open."""
    if parent is None or config.noise != "auto":
        return config
    return config.model_copy(update={"noise": parent.header.noise})


def inherit(pool: Pool, trained: Description, parent: Journal) -> str:
    """Bring fresh weights to where another run ended; return the fingerprint there.

    Args:
        pool: whose weights they are.
        trained: what it trains.
        parent: the other run's journal.

    Raises:
        EstuneError: the other run began with other weights, or its steps lead elsewhere here.
    """
    for what, here, there in (
        ("base model is", trained.base_hash, parent.header.base_hash),
        ("base weights are", trained.dtype, parent.header.dtype),
        ("live weights are", trained.live_dtype, parent.header.live_dtype),
        ("scales of noise are", trained.rule.scales, parent.header.scales),
        ("grid of integers is", trained.rule.grid, parent.header.rule.grid),
        ("trained tensors are", sorted(trained.tensors), sorted(parent.header.tensors)),
    ):
        if here != there:
            raise EstuneError(
                f"{parent.run}: its {what} {there}, here {here}; go on where it was run, with its settings"
            )
    found = pool.rebuild(parent.history)
    if found != parent.fingerprint():
        raise EstuneError(
            f"{parent.run}: its {amount(len(parent.history), 'steps')} give fingerprint {found} here, its "
            f"journal says {parent.fingerprint()}; go on where it was run"
        )
    return found

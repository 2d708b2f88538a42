"""Many runs with different settings: each a run of its own in a process of its own, under one directory.

The runs' own journals tell what is done, so a sweep that was cut off goes on where it was: finished runs are kept, a
run that was cut off is resumed, and one that failed is tried again.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import yaml

from estune.config import Config, merge, parse, read
from estune.errors import EstuneError
from estune.files import read_claim, write_text
from estune.journal.journal import FILE, Journal
from estune.journal.shares import is_share
from estune.run.directory import RunDirectory
from estune.run.make import make_task
from estune.study.jobs import Jobs, claimed

SETTINGS = "sweep.json"
STUDY = "optuna.log"
PREFIX = "sweep."
DOTS = ".."
METRICS = ("eval_accuracy", "eval_reward")
Values = dict[str, str]
Range = tuple[int, int] | tuple[float, float]


@dataclass(frozen=True)
class Space:
    """What is swept: settings with the values to take, or, to search, with a range `LOW..HIGH`."""

    grid: dict[str, list[str]]
    ranges: dict[str, Range]

    @property
    def names(self) -> set[str]:
        """All settings that are swept."""
        return {*self.grid, *self.ranges}

    def points(self) -> list[Values]:
        """Every combination of values; the last setting varies fastest.

        Raises:
            EstuneError: a range, which has no end of values.
        """
        if self.ranges:
            name = next(iter(self.ranges))
            raise EstuneError(
                f"sweep.{name} is a range, which a grid cannot take: list values with commas between, or search "
                "(--search optuna --trials N)"
            )
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: its folder.
        values: its swept settings, as given.
        metrics: metrics of its best evaluation, `eval_accuracy` and so on, with the `step`; empty if it failed.
        error: why it failed, in a line.
        shares: metrics that are declared to be accuracies in 0 to 1.
    """

    name: str
    values: Values
    metrics: dict[str, float]
    error: str | None = None
    shares: frozenset[str] = frozenset()


def split(overrides: Sequence[str]) -> tuple[list[str], Space]:
    """Separate what is swept, `sweep.KEY=...`, from the settings that all runs share.

    Raises:
        EstuneError: nothing is swept, a value is given twice, or the ends of a range are wrong.
    """
    shared = []
    grid = {}
    ranges = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if not key.startswith(PREFIX):
            shared.append(override)
            continue
        name = key.removeprefix(PREFIX).replace("-", "_")
        if DOTS in text and "/" not in text:  # no path, such as ../model
            ranges[name] = _range(name, text)
            continue
        grid[name] = [value.strip() for value in text.split(",") if value.strip()]
        if not grid[name] or len(set(grid[name])) < len(grid[name]):
            raise EstuneError(f"sweep.{name} {text!r}: list different values with commas between, like 0.01,0.02")
    if not grid and not ranges:
        raise EstuneError("nothing is swept: give a setting's values as --sweep.sigma 0.01,0.02 --sweep.seed 0,1,2")
    return shared, Space(grid, ranges)


def _range(name: str, text: str) -> Range:
    """The two ends of a range, as whole numbers if both are written so."""
    low, _, high = (part.strip() for part in text.partition(DOTS))
    if low.isdecimal() and high.isdecimal() and int(low) < int(high):
        return int(low), int(high)
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not ends[0] < ends[1] or not math.isfinite(ends[1] - ends[0]):
        raise EstuneError(f"sweep.{name} {text!r}: a range is LOW..HIGH, two numbers, the lower one first")
    return ends


def sweep(
    folder: Path,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    search: Literal["optuna"] | None = None,
    trials: int | None = None,
    metric: str = METRICS[0],
    told: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Run the trials of a sweep that are not done yet.

    Args:
        folder: the sweep's directory, in which each run has a folder.
        file, overrides: settings; those after `sweep.` are swept.
        jobs: runs at a time.
        search: choose values by the results of the runs so far, by Optuna's default method, instead of trying them all.
        trials: how many points a search draws.
        metric: the metric of a run's best evaluation that a search maximises.
        told: called with each trial as it ends, but not with those that were done before.

    Raises:
        EstuneError: bad settings, before anything runs, or a folder with another sweep. A run that fails raises
            nothing: its trial has an `error`.
    """
    if jobs < 1 or (trials is not None and trials < 1):
        raise EstuneError(f"jobs {jobs}, trials {trials}: give 1 or more")
    if (search is None) != (trials is None):
        raise EstuneError("--search optuna and --trials N go together: N runs are chosen by those before them")
    shared, space = split(overrides)
    settings = read(file, shared)
    if "output_dir" in settings:
        raise EstuneError("output_dir is the sweep's own: every run has a folder there; leave it out of the settings")
    if day := _date_of(folder):
        settings.setdefault("template_date", day)
    runner = _Runner(folder, settings, told or (lambda _: None))
    _refuse_unknown_metric(runner, space, metric)
    if search is not None:
        return _search(runner, space, jobs, trials or 0, metric)
    points = space.points()
    for point in points:
        runner.config(point)
    with _claimed(folder, {"settings": settings, "grid": space.grid}):
        return runner.jobs.each(lambda point: runner.run(name_of(point), point), points, jobs)


def _refuse_unknown_metric(runner: _Runner, space: Space, metric: str) -> None:
    """Refuse a metric that no evaluation of the first trial can have.

    Raises:
        EstuneError: with the names most like it.
    """
    if metric in METRICS:
        return
    from estune.run.metric_names import of_evaluation

    lows = {name: str(low) for name, (low, _) in space.ranges.items()}
    config = runner.config(next(iter(Space(space.grid, {}).points())) | lows)
    watched = {task.name: task for task in (options.build(config.seed) for options in config.watch)}
    of_evaluation(make_task(config), config, watched).refuse_unknown(metric, "--metric")


def name_of(values: Values) -> str:
    """The name of a run's folder, made of its swept settings."""
    return ",".join(f"{key}={value}" for key, value in values.items()).replace("/", "_")


class _Runner:
    """Runs trials, each by the command that a person would give."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], told: Callable[[Trial], None]) -> None:
        self.folder = folder
        self.settings = settings
        self.told = told
        self.jobs = Jobs()

    def config(self, values: Values) -> Config:
        """The settings of a trial.

        Raises:
            EstuneError: bad ones.
        """
        return parse(self._settings(values), f"sweep {name_of(values)}")

    def run(self, name: str, values: Values) -> Trial:
        """Run a trial to its end, wherever it was."""
        run = self.folder / name
        config = self.config(values)
        steps = config.steps
        if _is_done(run, steps):
            return self._trial(name, values)
        error = self._train(name, values, trust=config.trust_remote_code)
        if error is None and not _is_done(run, steps):
            error = "interrupted"
        trial = self._trial(name, values) if error is None else Trial(name, values, {}, error)
        self.told(trial)
        return trial

    def _train(self, name: str, values: Values, *, trust: bool) -> str | None:
        """Train, or go on where training was cut off; return why that failed, or None.

        `trust` says that the user lets the model's own code run, which has to be said again to go on.
        """
        run = self.folder / name
        if (run / FILE).is_file():
            # An interruption's, if any: with it, a run that is cut off after its last step passes for a whole one.
            shutil.rmtree(RunDirectory(run).final, ignore_errors=True)
            arguments = ["--resume", str(run), *(["--trust_remote_code", "true"] if trust else [])]
        else:
            shutil.rmtree(run, ignore_errors=True)  # a run that was cut off before its first line
            config = self.folder / f"{name}.yaml"
            from estune.pool.open import comparable_dtype

            settings = {**self._settings(values), "dtype": comparable_dtype(self.config(values))}
            write_text(config, yaml.safe_dump(settings, sort_keys=False))
            arguments = ["--config", str(config), "--output-dir", str(run)]
        return self.jobs.run("estune.cli", "train", *arguments, log=self.folder / f"{name}.log")

    def _settings(self, values: Values) -> dict[str, Any]:
        return merge(dict(self.settings), read(None, [f"{key}={value}" for key, value in values.items()]))

    def _trial(self, name: str, values: Values) -> Trial:
        journal = Journal.read(self.folder / name)
        if not journal.evaluations:
            return Trial(name, values, {}, "the task has no evaluation set to judge the run by")
        metrics = dict(journal.best.metrics) if journal.best else {}
        return Trial(name, values, metrics, shares=frozenset(key for key in metrics if is_share(journal, key)))


def _is_done(run: Path, steps: int) -> bool:
    """Whether a run took its last step, or stopped early, and has evaluated and written the result.

    A run that was interrupted has not, though it may have written something.

    Raises:
        EstuneError: its journal was changed.
    """
    if not RunDirectory(run).final.is_dir() or not (run / FILE).is_file():
        return False
    journal = Journal.read(run)
    if journal.header.format > 1:
        return journal.ended == "stopped early" or (journal.ended == "finished" and len(journal.steps) >= steps)
    patience = journal.settings.get("early_stopping_patience")
    if len(journal.steps) >= steps:
        # The first weights are always evaluated, where there is anything to evaluate on.
        return not journal.evaluations or journal.evaluations[-1].step >= steps
    if patience is None or not journal.evaluations:
        return False
    best = journal.best.step if journal.best else 0
    return sum(e.step > best for e in journal.evaluations) >= int(patience)


def _date_of(folder: Path) -> str | None:
    """The date that all runs of a sweep tell chat templates, that of its beginning; None if it began without one."""
    path = folder / SETTINGS
    if not path.is_file():
        return date.today().isoformat()
    found = read_claim(path, "settings")["settings"].get("template_date")
    return None if found is None else str(found)


def _claimed(folder: Path, mine: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Lock the folder, and keep in it what is swept. A grid may grow, a search may not.

    Raises:
        EstuneError: there is another sweep in the folder, or another process works on it.
    """
    mine = json.loads(json.dumps(mine, default=str))

    def check(there: Mapping[str, Any]) -> None:
        if there["settings"] != mine["settings"] or there.keys() != mine.keys():
            raise EstuneError(f"{folder} holds a sweep with other settings; give the same, or another --output-dir")
        if list(there["grid"]) != list(mine["grid"]) or there.get("ranges") != mine.get("ranges"):
            raise EstuneError(f"{folder} holds a sweep of other settings; sweep the same, or give another --output-dir")
        other = [name for name, listed in mine["grid"].items() if listed != there["grid"][name]]
        if "ranges" in mine and other:  # Optuna's choices cannot change
            raise EstuneError(
                f"{folder} holds a search over other values of {', '.join(other)}; give the same, or another "
                "--output-dir"
            )

    return claimed(folder, SETTINGS, "sweep", mine, ("settings", "grid"), check)


def _search(runner: _Runner, space: Space, jobs: int, count: int, metric: str) -> list[Trial]:
    """Check all values that may be chosen, then run the trials of a search.

    Raises:
        EstuneError: Optuna is not installed, or a setting does not take a value that may be chosen.
    """
    if find_spec("optuna") is None:
        raise EstuneError("--search optuna needs Optuna; install it with `pip install 'estune[sweep]'`")
    for end in (0, 1):
        ends = {name: str(found[end]) for name, found in space.ranges.items()}
        for listed in Space(space.grid, {}).points():
            runner.config(listed | ends)
    with _claimed(runner.folder, {"settings": runner.settings, "grid": space.grid, "ranges": space.ranges}):
        return _choose(runner, space, jobs, count, metric)


def _choose(runner: _Runner, space: Space, jobs: int, count: int, metric: str) -> list[Trial]:
    """Run trials, each with the values that Optuna chooses by those before it.

    What a trial draws follows from its number and the trials before it, so that a search that was stopped goes on as if
    it had not been. Values that were drawn before are not run again: the run would be the same to the bit.
    """
    import numpy as np
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="sweep",
        storage=JournalStorage(JournalFileBackend(str(runner.folder / STUDY))),
        direction="maximize",
        load_if_exists=True,
    )
    # Of a sweep that was cut off: a trial that was running goes on, one that had failed is tried again.
    begun = {trial.number: trial for trial in study.trials if trial.params.keys() == space.names}
    running = optuna.trial.TrialState.RUNNING
    seed = int(runner.settings.get("seed", 0))
    asking = Lock()
    ended: dict[str, Trial] = {}

    def ask() -> tuple[int, Values]:
        with asking:
            drawn = np.random.SeedSequence([seed, len(study.trials)]).generate_state(1)
            study.sampler = optuna.samplers.TPESampler(seed=int(drawn[0]), constant_liar=jobs > 1)
            asked = study.ask()
            return asked.number, _as_text(_suggest(asked, space))

    def one(old: Any) -> Trial:
        number, values = (old.number, _as_text(old.params)) if old else ask()
        trial = ended.get(name_of(values)) or runner.run(f"trial-{number:03d}", values)
        if trial.error is None:
            ended[name_of(values)] = trial
        if old is None or old.state == running:
            value = trial.metrics.get(metric)
            failed = optuna.trial.TrialState.FAIL
            study.tell(number, value, state=failed if value is None else None)
        return trial

    first = list(begun.values())[:count]
    return runner.jobs.each(one, [*first, *[None] * (count - len(first))], jobs)


def _suggest(asked: Any, space: Space) -> dict[str, Any]:
    """Values for a trial. A range over a factor of ten or more is searched by its logarithm."""
    values = {name: asked.suggest_categorical(name, listed) for name, listed in space.grid.items()}
    for name, (low, high) in space.ranges.items():
        logarithmic = low > 0 and high / low >= 10
        suggest = asked.suggest_int if isinstance(low, int) else asked.suggest_float
        values[name] = suggest(name, low, high, log=logarithmic)
    return values


def _as_text(values: Mapping[str, Any]) -> Values:
    return {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}

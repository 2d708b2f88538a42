"""The names that metrics can have, so that a setting that names another is refused before anything is generated.

What functions log comes under names of their own, which nobody knows before they are called. So a name is refused where
it is one of those that estune keeps for itself, or where no function of the task can log.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from estune.config import Config
from estune.errors import EstuneError
from estune.grading.convention import FAILURES, RewardFunction, is_ours, reward_name
from estune.run.judged import parts_of
from estune.tasks.base import Task

COMPARED = ("kl", "weights/change", "weights/relative_change")
"""What `Pool.compare` tells, as far as it can."""
COMPLETIONS = ("mean_length", "clipped_ratio", "distinct")
NEAREST = 3
ALIKE = 0.75  # of `difflib`


@dataclass(frozen=True)
class Names:
    """Names of metrics.

    Attributes:
        known: those that there are.
        loggers: the functions that may add to them, by what stands before their metrics' names.
    """

    known: frozenset[str]
    loggers: Mapping[str, Sequence[str]]

    def refuse_unknown(self, name: str, what: str) -> None:
        """Refuse a name that no metric can have.

        Args:
            name: the metric's.
            what: the setting that gives it.

        Raises:
            EstuneError: with the names most like it.
        """
        if name in self.known or self._may_be_logged(name):
            return
        near = difflib.get_close_matches(name, self.known, NEAREST, ALIKE)
        hint = f"did you mean {' or '.join(near)}? There are" if near else "there are"
        raise EstuneError(f"{what}: no metric can be called {name!r}; {hint} {', '.join(sorted(self.known))}")

    def _may_be_logged(self, name: str) -> bool:
        for before, functions in self.loggers.items():
            rest = name.removeprefix(before)
            if functions and name.startswith(before):
                return not is_ours(rest) or rest.startswith(tuple(f"rewards/{each}/" for each in functions))
        return False

    def under(self, before: str) -> Names:
        """These with something before each name."""
        return Names(
            frozenset(before + name for name in self.known),
            {before + key: functions for key, functions in self.loggers.items()},
        )


def refuse_unknown_constraint(config: Config, task: Task) -> None:
    """Refuse a constraint on a metric that no step can have.

    Raises:
        EstuneError: with the names most like it.
    """
    if config.constraint is None:
        return
    if config.constrains_kl and task.rollout is not None:
        raise EstuneError("constraint: kl is told of completions, and not of rollouts; constrain something else")
    metric, _, _ = parts_of(config.constraint)
    names = of_member(task)
    replace(names, known=names.known | {"kl"}).refuse_unknown(metric, "constraint")


def refuse_unknown_best(best_by: Sequence[str], names: Names) -> None:
    """Refuse metrics by which no evaluation could be the best; before one of which less is better stands `-`.

    Raises:
        EstuneError: with the names most like it.
    """
    for metric in best_by:
        names.refuse_unknown(metric.removeprefix("-"), "best_by (metric_for_best_model)")


def of_member(task: Task) -> Names:
    """Names of the metrics of a member's completions, as `Graded.metrics` makes them."""
    names = [reward_name(function) for function in task.reward_funcs]
    known = {"reward", *(f"completions/{name}" for name in COMPLETIONS)}
    known |= {f"rewards/{name}/{kind}" for name in names for kind in ("mean", *FAILURES)}
    return Names(frozenset(known), {"": [reward_name(f) for f in task.reward_funcs if _can_log(f)]})


def of_evaluation(task: Task, config: Config, watched: Mapping[str, Task]) -> Names:
    """Names of the metrics of an evaluation, as `Evaluations.evaluate` makes them.

    Args:
        task: the run's own.
        config: the settings.
        watched: tasks that are watched, by name.
    """
    found = [_of_set(task, config, COMPARED).under("eval_")]
    found += [_of_set(other, config).under(f"watch/{name}/") for name, other in watched.items()]
    known = frozenset(name for each in found for name in each.known)
    return Names(known, {key: functions for each in found for key, functions in each.loggers.items()})


def _of_set(task: Task, config: Config, more: Iterable[str] = ()) -> Names:
    """Names of what is told of a held-out set."""
    names = of_member(task)
    known = {*names.known, *more, "accuracy"}
    if task.group:
        known |= {f"accuracy/{row[task.group]}" for row in task.evaluation}
    if config.eval_samples > 1:
        known |= {f"mean@{config.eval_samples}"}
        known |= {f"pass@{1 << i}" for i in range(config.eval_samples.bit_length())}
    return Names(frozenset(known), names.loggers)


def _can_log(function: RewardFunction) -> bool:
    """Whether a function can log: it takes `log_metric`, by name or among others whose name shows that they are used.

    By Python's custom `**_` are not.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a callable that does not tell
        return True
    return any(p.name == "log_metric" or (p.kind is p.VAR_KEYWORD and not p.name.startswith("_")) for p in parameters)

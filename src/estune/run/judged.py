"""What members are judged by: the objective over their completions' scores, less what a second objective costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from estune.config import Config
from estune.errors import EstuneError
from estune.es.adaptation import Constraint
from estune.es.objective import Objective
from estune.run.graded import Graded


def parts_of(constraint: str) -> tuple[str, str, str]:
    """Metric, `<=` or `>=`, and bound of a constraint."""
    metric, sign, bound = re.split("(<=|>=)", constraint)
    return metric, sign, bound


class Judge:
    """Gives each member of a step its fitness.

    Args:
        config: the settings.
        state: where it goes on, as `state` gave it.
    """

    def __init__(self, config: Config, state: Mapping[str, float]) -> None:
        self._groups = config.prompt_groups
        self._objective = Objective(
            config.samples_per_prompt, config.best_of, config.reward_quantile, config.per_prompt
        )
        self._constraint: Constraint | None = None
        if config.constraint is not None:
            self._metric, sign, bound = parts_of(config.constraint)
            self._constraint = Constraint(float(bound), sign == "<=", config.constraint_rate)
            self._constraint.multiplier = state.get("penalty", 0.0)

    def fitness(self, members: Sequence[Graded]) -> list[float | None]:
        """One number for each of a step's members, in their order; None for one that has failed.

        Raises:
            EstuneError: where no member has the metric that the constraint names.
        """
        fitness = self._objective.fitness([g.grades.total for g in members], self._groups)
        if self._constraint is None:
            return fitness
        values = [g.metrics().get(self._metric) for g in members]
        if all(value is None for value in values):
            if any(self._metric == f"rewards/{name}/mean" for name in members[0].grades.scores):
                return fitness  # the step has no prompt of the task in a mix whose reward this is
            known = ", ".join(sorted(members[0].metrics()))
            raise EstuneError(
                f"constraint: this step has no metric {self._metric}; there are {known}; give another output_dir"
            )
        return self._constraint.fitness(fitness, values, self._groups)

    def state(self) -> dict[str, float]:
        """The constraint's penalty, where there is one."""
        return {} if self._constraint is None else {"penalty": self._constraint.multiplier}

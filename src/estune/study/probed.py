"""What a probe has found: what each size of perturbation does, and which of them to train with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The mean over members has to keep this share of the base's reward above the worst that any member fell to.
KEPT = 0.5
COLLAPSED = 0.1
# A spread over members tells good directions from bad ones if it is this many times that of repeated evaluations.
ABOVE_NOISE = 2.0
# A deviation of no more than this share of the mean is the rounding of equal numbers.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Level:
    """What one size of perturbation does.

    Attributes:
        sigma: the size.
        rewards: mean reward of each member that has one.
        mean, spread: mean and population standard deviation of these.
        best: the largest of these.
        accuracy: mean over members of the task's accuracy; NaN if it has none.
        kept: the share of the base's reward that the mean keeps, from 1 for all of it or more to 0 for as little as the
            worst member of all sizes has; or the share of its accuracy, if that is less, as a reward can be earned by
            what nobody meant. NaN if the base has neither.
        changed: share of completions that differ from the base's in any token.
        clipped: share of completions that did not end.
        collapsed: whether hardly anything is left of what the base can do.
    """

    sigma: float
    rewards: list[float]
    mean: float
    spread: float
    best: float
    accuracy: float
    kept: float
    changed: float
    clipped: float
    collapsed: bool


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        model, task, prompts, members: what was tried, on how many prompts, with how many members for each size.
        base: mean reward of the unperturbed weights over repeated evaluations.
        noise: standard deviation of these evaluations; 0 if decoding is exact.
        levels: the sizes, by rising sigma.
        sigma: the sigma to train with, or None if none will do.
        reason: why, in a sentence.
        warnings: what stands in the way of learning.
        share: whether accuracies lie in 0 to 1 by declaration, and are shown in percent.
        lengths: tokens of the base's completions, for `estune estimate --lengths`.
    """

    model: str
    task: str
    prompts: int
    members: int
    base: float
    noise: float
    levels: list[Level]
    sigma: float | None
    reason: str
    warnings: list[str]
    share: bool = False
    lengths: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The whole probe for `json.dumps`; numbers that are not finite become None."""
        finite: dict[str, Any] = _finite(asdict(self))
        return finite

    def rows(self) -> list[list[str]]:
        """Rows of a table: a heading, then one for each sigma."""
        head = ["sigma", "mean", "spread", "best", "accuracy", "kept", "changed", "clipped", ""]
        return [head, *([*_cells(level, share=self.share), self._note(level)] for level in self.levels)]

    def _note(self, level: Level) -> str:
        if level.sigma == self.sigma:
            return "recommended"
        if level.collapsed:
            return "collapsed"
        return "" if self.tells(level) else "members alike"

    def tells(self, level: Level) -> bool:
        """Whether members differ by more than chance, as they must for a step to learn."""
        return _tells(level, self.noise)

    @property
    def recommended(self) -> Level | None:
        """The size to train with."""
        return next((level for level in self.levels if level.sigma == self.sigma), None)


def best_part(parts: Mapping[str, Probe]) -> str | None:
    """The part whose best member, at the size to train with, earns most; None where none earns more than the base."""
    best = {part: level.best for part, found in parts.items() if (level := found.recommended) is not None}
    part = max(best, key=best.__getitem__, default=None)
    return None if part is None or best[part] <= parts[part].base + ABOVE_NOISE * parts[part].noise else part


def rows_of_parts(parts: Mapping[str, Probe]) -> list[list[str]]:
    """Rows of a table: a heading, then the size to train with of each part."""
    head, *_ = next(iter(parts.values())).rows()
    rows = []
    for part, found in parts.items():
        level = found.recommended
        cells = ["none"] if level is None else _cells(level, share=found.share)
        rows.append([part, *cells, *[""] * (len(head) - 1 - len(cells))])
    return [["part", *head[:-1]], *rows]


def recommend(levels: Sequence[Level], base: float, noise: float) -> tuple[float | None, str]:
    """The largest sigma at which members still do most of what the base does, and differ by more than chance.

    The larger sigma is, the further a step looks, and the more of the rewards' spread is worth following. Beyond what
    the model survives, the spread is between ways to fail.
    """
    telling = [level for level in levels if _tells(level, noise) and not level.collapsed]
    if not telling:
        return None, "at no sigma do members differ by more than chance without collapsing"
    sound = [level for level in telling if math.isnan(level.kept) or level.kept >= KEPT]
    if not sound:
        mildest = telling[0]
        return mildest.sigma, (
            f"the smallest at which members differ, though they keep only {mildest.kept:.0%} of what the base does: "
            "try smaller ones"
        )
    if all(math.isnan(level.kept) for level in sound):
        widest = max(sound, key=lambda level: level.spread)
        return widest.sigma, f"the base earns {base:.3g}, no more than any member, and here members differ most"
    chosen = sound[-1]
    return chosen.sigma, (
        f"the largest at which members keep at least {KEPT:.0%} of the base's reward and accuracy "
        f"({chosen.kept:.0%}: mean {chosen.mean:.3g}, base {base:.3g}) and differ by more than chance "
        f"({chosen.spread:.2g} against {noise:.2g})"
    )


def _tells(level: Level, noise: float) -> bool:
    return level.spread > ABOVE_NOISE * noise and level.spread > ROUNDING * abs(level.mean)


def warnings_of(levels: Sequence[Level], base: float, noise: float, members: int) -> list[str]:
    """What stands in the way of learning, a sentence each."""
    found = []
    if all(level.collapsed for level in levels):
        found.append(f"every sigma destroys the model: try below {levels[0].sigma:g}")
    elif not any(_tells(level, noise) for level in levels):
        coarse = "the reward is too coarse for this model (give part of it for part of the work) or prompts are too few"
        same = f"no completion differs from the base's: try above {levels[-1].sigma:g}"
        why = coarse if levels[-1].changed else same
        found.append(
            f"every member scores the same, within chance, at every sigma, so there is nothing to learn: {why}"
        )
    if failed := sum(members - len(level.rewards) for level in levels):
        found.append(f"{failed} of {members * len(levels)} members have no reward: mend the reward function")
    if noise > 0 and any(_tells(level, noise) for level in levels):
        found.append(f"the same weights score differently from one time to the next (by {noise:.2g} around {base:.3g})")
    return found


def _cells(level: Level, *, share: bool) -> list[str]:
    accuracy = f"{level.accuracy:.0%}" if share else f"{level.accuracy:.4g}"
    return [
        f"{level.sigma:.3g}",
        f"{level.mean:.4f}",
        f"{level.spread:.4f}",
        f"{level.best:.4f}",
        "" if math.isnan(level.accuracy) else accuracy,
        "" if math.isnan(level.kept) else f"{level.kept:.0%}",
        f"{level.changed:.0%}",
        f"{level.clipped:.0%}",
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

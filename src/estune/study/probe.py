"""Before training: what perturbations of several sizes do to the reward, and which of them to train with.

Members are drawn, perturbed and graded as a training step does it, over the pool that a run would use. All sizes see
the same prompts and the same directions, so that they differ by nothing but sigma.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from estune.charts.words import amount
from estune.completion import Completion
from estune.config import Config
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.es.strategy import Member, mean_and_std, member_seed
from estune.grading.convention import Row
from estune.grading.grading import Grading
from estune.grading.level import refuse_level
from estune.pool.base import Pool
from estune.pool.open import open_pool, with_resources
from estune.pool.waiting import told_while_generating
from estune.run.asked import UNREACHED, first_prompts
from estune.run.graded import Graded, grade_completions
from estune.run.make import make_grading, make_sampling
from estune.tasks.base import Task
from estune.weights.checkpoint import Checkpoint
from estune.weights.integers import refuse_pattern
from estune.weights.locate import check_name, locate
from estune.weights.policies import POLICIES

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
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


def probe(
    config: Config,
    *,
    task: Task | None = None,
    pool: Pool | None = None,
    sigmas: Sequence[float] | None = None,
    members: int = 8,
    prompts: int = 100,
    repeats: int = 3,
) -> Probe:
    """Try perturbations of several sizes. With the defaults this costs about as much as one of the paper's steps.

    Args:
        config: the settings of the run to come; its `sigma` is the middle of the sizes.
        task: a task of your own; by default the one the settings name.
        pool: evaluates, and has the base weights; by default the settings' pool, opened and closed here.
        sigmas: sizes to try; by default from an eighth of the settings' to eight times it.
        members: perturbations of each size, 2 or more.
        prompts: training prompts to answer; `prompts_per_step` if that is less.
        repeats: evaluations of the base, for the noise floor, 2 or more.

    Raises:
        EstuneError: for bad arguments, for what `Trainer` would refuse, or where the base has no reward.
    """
    tried = sorted({config.sigma * f for f in FACTORS} if sigmas is None else set(sigmas))
    if not tried or not all(sigma > 0 and math.isfinite(sigma) for sigma in tried):
        raise EstuneError(f"sigmas {', '.join(map(str, tried)) or 'none'}: give numbers above 0")
    if members < 2 or repeats < 2 or prompts < 1:
        raise EstuneError(
            f"probe: {amount(members, 'members')}, {amount(repeats, 'repeats')}, {amount(prompts, 'prompts')}; a "
            "spread takes two members and two repeats, and a reward one prompt"
        )
    if pool is None:
        check_name(config.model)
    task = task or config.task.build(config.seed)
    opened = None
    if pool is None:
        config = with_resources(config, alone=task.rollout is not None)
    refuse_level(task.reward_funcs, "probe", "members are compared with the base model alone", "population")
    rows, ids = first_prompts(config, task, open_encoder(config), min(prompts, config.prompts_per_step))
    if pool is None:
        opened = pool = open_pool(config, max(map(len, ids)))
    try:
        with make_grading(config, task) as grading:
            return _Probing(config, task, pool, grading, rows, ids).run(tried, members, repeats)
    finally:
        if opened is not None:
            opened.close()


def probe_parts(
    config: Config, parts: Sequence[str], told: Callable[[str, Probe], object] | None = None, **arguments: Any
) -> dict[str, Probe]:
    """Probe parts of a model, one after the other, on the same prompts.

    Args:
        config: the settings of the run to come.
        parts: patterns, as `train_parameters` takes them, one at least.
        told: called with each part and what was found of it as it comes.
        arguments: those of `probe`, but for `pool`: each part has one of its own.

    Returns:
        What was found of each part.

    Raises:
        EstuneError: as of `probe`; a pattern that leaves nothing to train is refused before anything is tried.
    """
    if config.adapter is None:
        tensors = Checkpoint(locate(config.model)).tensors
        for part in parts:
            refuse_pattern(part, tensors, POLICIES[config.weights].bits)
    found = {}
    for part in parts:
        found[part] = probe(config.model_copy(update={"train_parameters": part}), **arguments)
        if told is not None:
            told(part, found[part])
    return found


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


class _Probing:
    """Prompts of the run's first step, the pool that answers them, and the rewards that grade the answers."""

    def __init__(
        self, config: Config, task: Task, pool: Pool, grading: Grading, rows: list[Row], ids: list[list[int]]
    ) -> None:
        self.config = config
        self.task = task
        self.pool = pool
        self.grading = grading
        self.rows = rows
        self.ids = ids
        self.sampling = make_sampling(config, member_seed(config.seed, UNREACHED, 1 << 23))

    def run(self, sigmas: Sequence[float], count: int, repeats: int) -> Probe:
        times = repeats + count * len(sigmas)
        what = f"trying {len(sigmas)} sizes of perturbation"
        places = times * len(self.ids) * self.config.max_new_tokens
        with told_while_generating(what, self.pool, times * sum(map(len, self.ids)), places):
            first, base, noise = self._base(repeats)
            members = [Member(member_seed(self.config.seed, UNREACHED, i)) for i in range(count)]
            tried = {sigma: self._members(members, sigma) for sigma in sigmas}
        found = [[r for g in graded if (r := g.grades.mean) is not None] for graded in tried.values()]
        worst = min([base, *(reward for rewards in found for reward in rewards)])
        levels = [
            self._level(sigma, graded, rewards, first, base, worst)
            for (sigma, graded), rewards in zip(tried.items(), found, strict=True)
        ]
        sigma, reason = recommend(levels, base, noise)
        return Probe(
            model=self.config.model,
            task=self.task.name,
            prompts=len(self.rows),
            members=count,
            base=base,
            noise=noise,
            levels=levels,
            sigma=sigma,
            reason=reason,
            warnings=_warnings(levels, base, noise, count),
            lengths=[len(c.token_ids) for c in first.completions],
            share=self.task.accuracy_is_share,
        )

    def _base(self, repeats: int) -> tuple[Graded, float, float]:
        """The base's answers, drawn as members draw them; its mean reward over repeats, and their spread.

        Repeats have other sampling seeds, if decoding is sampled, as members have.
        """
        graded = []
        for i in range(repeats):
            sampling = make_sampling(self.config, member_seed(self.config.seed, UNREACHED + i, 1 << 23))
            graded.append(self._grade(self.pool.generate(self.ids, sampling)))
        rewards = [g.grades.mean for g in graded]
        if any(r is None for r in rewards):
            raise EstuneError(f"task {self.task.name}: the base model's answers have no reward; mend the reward")
        mean, spread = mean_and_std([r for r in rewards if r is not None])
        if spread <= ROUNDING * abs(mean):
            return graded[0], mean, 0.0
        # Of few repeats the standard deviation of the sample is the less wrong.
        return graded[0], mean, spread * math.sqrt(repeats / (repeats - 1))

    def _members(self, members: Sequence[Member], sigma: float) -> list[Graded]:
        graded = {
            index: self._grade(done.completions)
            for index, done in self.pool.evaluate(members, sigma, self.ids, self.sampling)
        }
        return [graded[i] for i in range(len(members))]

    def _grade(self, completions: list[Completion]) -> Graded:
        return grade_completions(self.task, self.rows, completions, self.grading)

    def _level(
        self, sigma: float, graded: Sequence[Graded], rewards: list[float], base: Graded, reward: float, worst: float
    ) -> Level:
        pairs = [(c, b) for g in graded for c, b in zip(g.completions, base.completions, strict=True)]
        clipped = sum(not c.finished for c, _ in pairs) / len(pairs)
        before = sum(not c.finished for c in base.completions) / len(base.completions)
        mean, spread = mean_and_std(rewards)
        accuracy = statistics.fmean(map(self._accuracy, graded))
        right = self._accuracy(base)
        kept = [1.0]
        if reward > worst:
            kept.append((mean - worst) / (reward - worst))
        if right > 0:
            kept.append(accuracy / right)
        return Level(
            sigma=sigma,
            rewards=rewards,
            mean=mean,
            spread=spread,
            best=max(rewards, default=math.nan),
            accuracy=accuracy,
            kept=min(kept) if len(kept) > 1 else math.nan,
            changed=sum(c.token_ids != b.token_ids for c, b in pairs) / len(pairs),
            clipped=clipped,
            # A base that earns nothing cannot fall: what is left to see is that it no longer ends its answers.
            collapsed=not rewards or min(kept) < COLLAPSED or clipped - before > 1 - COLLAPSED,
        )

    def _accuracy(self, graded: Graded) -> float:
        return self.task.accuracy_of(graded.rows, graded.grades.scores).get("", math.nan)


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


def _warnings(levels: Sequence[Level], base: float, noise: float, members: int) -> list[str]:
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

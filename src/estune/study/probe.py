"""Before training: what perturbations of several sizes do to the reward, and which of them to train with.

Members are drawn, perturbed and graded as a training step does it, over the pool that a run would use. All sizes see
the same prompts and the same directions, so that they differ by nothing but sigma.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
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
from estune.pool.waiting import check_model, told_while_generating
from estune.run.asked import UNREACHED, first_prompts
from estune.run.graded import Graded, grade_completions
from estune.run.make import make_grading, make_sampling, make_task
from estune.study.probed import COLLAPSED, ROUNDING, Level, Probe, recommend, warnings_of
from estune.tasks.base import Task
from estune.weights.checkpoint import Checkpoint
from estune.weights.integers import refuse_pattern
from estune.weights.locate import locate
from estune.weights.policies import POLICIES

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)


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
        check_model(config.model)
    task = task or make_task(config)
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
            warnings=warnings_of(levels, base, noise, count),
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

"""Evolution Strategies in parts that settings combine. The defaults are the paper's.

"Evolution Strategies at Scale" (arXiv 2509.24372): N members theta + sigma * eps_n, one reward each, and the update
theta <- theta + alpha / N * sum_n z_n * eps_n with z-scored rewards z_n, 1/sigma absorbed in alpha. Every part works on
rewards, seeds and coefficients alone, so that journal, workers and replay need to know none of them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from estune.es.adam import Adam
from estune.es.adaptation import OneFifth
from estune.es.earlier import Momentum, Past
from estune.es.guided import Guided
from estune.es.rate import Rate
from estune.es.schedule import Schedule
from estune.es.shaping import Shaping, shape
from estune.es.sharpness import SharpnessAware
from estune.es.strategy import Member, Update, alike, float32, member_seed, plain

log = logging.getLogger(__name__)

_BASE = 1 << 22  # index of the base among a step's members


class EvolutionStrategy:
    """The paper's strategy, and what can be changed of it.

    Args:
        seed: the run's seed; member seeds are a function of (seed, step, index).
        population: members a step (N), 2 or more; even if `mirrored`.
        sigma: standard deviation of the perturbation, above 0.
        learning_rate: alpha, or, as `0.5sigma`, a multiple of sigma, which it then follows; what `Rate.default` says of
            the population if None.
        steps: length of the run, which the schedules refer to.
        lr_schedule, sigma_schedule: factors over the run.
        shaping: from rewards to weights, see `shape`.
        shaping_share: of the members, for shapings that treat the best or the outermost otherwise.
        weight_decay: share of the weights taken off a step, times the learning rate; none where rewards are equal.
        anchor_decay: share of the distance from the base model that is taken back a step, times the learning rate; none
            where rewards are equal (L2-SP's penalty, arXiv 1802.01483, decoupled as in arXiv 1711.05101).
        anchor_l1: how far each weight is brought back toward the base model's a step, times the learning rate (the
            same paper's L1-SP, as its proximal step).
        mirrored: evaluate each direction with both signs, theta +- sigma eps (Brockhoff et al. 2010): the update is
            then alpha / N sum_i (z_i+ - z_i-) eps_i over the N / 2 directions.
        momentum: what earlier steps add.
        adam: scales the update of each weight by its moments, in place of `momentum`.
        guided: perturbs members along the last updates, too, in place of `momentum` and `adam`.
        sharpness: makes of every two steps a sharpness-aware one, in place of these three; decay is in the first.
        adapt_sigma: the one-fifth rule, for which the base is evaluated too.
        evaluate_base: evaluate the base as one more member, of sign 0, which comes last.
        groups: of members, one after another and of equal size, that have tasks of their own; the base takes part in
            each, as its last.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        population: int = 30,
        sigma: float = 0.001,
        learning_rate: float | str | None = None,
        steps: int = 1,
        lr_schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        sigma_schedule: Schedule = Schedule(),  # noqa: B008
        shaping: Shaping = "zscore",
        shaping_share: float = 0.25,
        weight_decay: float = 0.0,
        anchor_decay: float = 0.0,
        anchor_l1: float = 0.0,
        mirrored: bool = False,
        momentum: Momentum = Momentum(),  # noqa: B008
        adam: Adam | None = None,
        guided: Guided | None = None,
        sharpness: SharpnessAware | None = None,
        adapt_sigma: bool = False,
        evaluate_base: bool = False,
        groups: int = 1,
    ) -> None:
        if not sigma > 0 or not math.isfinite(sigma):
            raise ValueError(f"sigma is {sigma}: it must be above 0")
        if population < 2 or (mirrored and population % 2):
            raise ValueError(f"population is {population}: it must be 2 or more, and even when mirrored")
        if groups < 1 or population % (2 * groups if mirrored else groups):
            pairs = ", in pairs" if mirrored else ""
            raise ValueError(f"population {population} makes no {groups} groups of equal size{pairs}")
        if adam is not None and momentum.beta:
            raise ValueError("adam has a first moment of its own: momentum must be 0")
        if guided is not None and (momentum.beta or adam is not None):
            raise ValueError("guided members have the last updates in them: momentum must be 0, and adam left out")
        if sharpness is not None and (momentum.beta or adam is not None or guided is not None):
            raise ValueError("a sharpness-aware step adds no others: momentum must be 0, adam and guided left out")
        self.seed = seed
        self.population = population
        self.peak_sigma = sigma
        self.peak_learning_rate = Rate.default(population) if learning_rate is None else Rate.read(learning_rate)
        self.steps = steps
        self.lr_schedule = lr_schedule
        self.sigma_schedule = sigma_schedule
        self.shaping: Shaping = shaping
        self.shaping_share = shaping_share
        self.weight_decay = weight_decay
        self.anchor_decay = anchor_decay
        self.anchor_l1 = anchor_l1
        self.mirrored = mirrored
        self.evaluate_base = evaluate_base or adapt_sigma
        self.groups = groups
        self.step = 0
        self._momentum = momentum
        self._past = Past(momentum, guided.window if guided else 0)
        self._guided = guided
        self._sharpness = sharpness
        self._adam = adam
        self._taken_in = 0  # updates that the moments have had
        self._one_fifth = OneFifth() if adapt_sigma else None
        self._caution = 1.0  # factor of the learning rate, halved by each step that was taken back

    @property
    def sigma(self) -> float:
        """Standard deviation of the current step's perturbations."""
        adapted = self._one_fifth.factor if self._one_fifth else 1.0
        return self.peak_sigma * adapted * self.sigma_schedule.factor(self.step, self.steps)

    @property
    def learning_rate(self) -> float:
        """Alpha of the current step."""
        peak = self.peak_learning_rate.at(self.sigma)
        return peak * self._caution * self.lr_schedule.factor(self.step, self.steps)

    @property
    def displaced(self) -> bool:
        """Whether the base is at the worse point that a sharpness-aware step goes to first, not where the run is."""
        return self._sharpness is not None and self.step % 2 == 1

    def ask(self, step: int | None = None) -> list[Member]:
        """The members of a step, the current one if None, in a fixed order; the base as the last of each group."""
        step = self.step if step is None else step
        if self.mirrored:
            seeds = [member_seed(self.seed, step, i) for i in range(self.population // 2)]
            members = [Member(s, sign) for s in seeds for sign in (1, -1)]
        else:
            members = [Member(member_seed(self.seed, step, i)) for i in range(self.population)]
        if self._guided:
            members = self._guided.members(members, self._past.steps)
        if not self.evaluate_base:
            return members
        base = Member(member_seed(self.seed, step, _BASE), 0)
        size = self.population // self.groups
        return [m for first in range(0, self.population, size) for m in (*members[first : first + size], base)]

    def tell(self, rewards: Sequence[float | None]) -> Update:
        """Shape the rewards and turn them into coefficients.

        Members whose reward is None or not finite get no weight, and N counts the rest. Where all rewards are equal
        there is nothing to learn, and the update changes nothing.
        """
        members = self.ask()
        if len(rewards) != len(members):
            raise ValueError(f"{len(rewards)} rewards for {len(members)} members")
        known = {i: r for i, r in enumerate(rewards) if r is not None and math.isfinite(r)}
        at = [i for i in known if members[i].sign]
        valid = [known[i] for i in at]
        if len(valid) < self.population:
            failed = self.population - len(valid)
            log.warning("step %d: %d of %d members failed", self.step + 1, failed, self.population)
        if len(valid) < 2:
            log.warning("step %d: fewer than two members have a reward, so the weights stay as they are", self.step + 1)
        update = self._unchanged(members) if alike(valid) else self._update(members, at, valid)
        self._past.add(update.pairs, (*update.pairs, *update.earlier))
        self._taken_in += update.moments is not None
        if self._one_fifth:
            size = len(members) // self.groups
            bases = [i - i % size + size - 1 for i in at]  # of the same group
            self._one_fifth.tell([known[i] - known[base] for i, base in zip(at, bases, strict=True) if base in known])
        self.step += 1
        return update

    def take_back(self, update: Update) -> Update:
        """Make the last step, which gave this update, one that changes nothing, and halve the learning rate."""
        self._caution /= 2
        self._taken_in -= update.moments is not None
        self._past.add((), (), instead=True)
        return update.undone()

    def _unchanged(self, members: Sequence[Member]) -> Update:
        back = (-1.0,) if self.displaced else ()
        return Update(
            self.step,
            plain(members),
            (0.0,) * len(members),
            rounding_seed=self._rounding_seed,
            earlier=self._past.terms(back),
            factors=back,
            sigma=self.sigma,
        )

    def _update(self, members: Sequence[Member], at: Sequence[int], rewards: Sequence[float]) -> Update:
        """The update by those members, given by their indices, that have a reward."""
        alpha = self.learning_rate
        scale = alpha if self._adam is None else 1.0  # with moments alpha scales what these make of it
        shaped = shape(rewards, self.shaping, self.shaping_share)
        weights = [scale / len(rewards) * weight for weight in shaped]
        own, factors = self._shares([members[i] for i in at], weights)
        decay = 0.0 if self.displaced else alpha
        coefficients = [0.0] * len(members)
        for i, weight in zip(at, weights, strict=True):
            coefficients[i] = float32(weight * members[i].sign * own)
        return Update(
            self.step,
            plain(members),
            tuple(coefficients),
            float32(-min(1.0, decay * self.weight_decay)),
            self._rounding_seed,
            self._past.terms(factors),
            tuple(factors),
            float32(min(1.0, decay * self.anchor_decay)),
            float32(decay * self.anchor_l1),
            None if self._adam is None else self._adam.moments(alpha, len(rewards), self._taken_in + 1),
            self.sigma,
        )

    def _shares(self, members: Sequence[Member], weights: Sequence[float]) -> tuple[float, list[float]]:
        """The factors in an update of what these members give by these weights, and of the last steps' terms."""
        past = self._past.steps
        if self._sharpness:
            return (1.0, [-1.0]) if self.displaced else (self._sharpness.down(members, weights, self.sigma), [])
        if self._guided:
            return self._guided.own(past), self._guided.factors(members, weights, past)
        return self._momentum.own, self._past.factors(self.sigma)

    @property
    def _rounding_seed(self) -> int:
        return member_seed(self.seed, self.step, self.population)

    def state(self) -> dict[str, Any]:
        """What `recall` takes beside the updates so far, as JSON holds it; empty where these say all."""
        found = {"sigma_factor": self._one_fifth.factor} if self._one_fifth else {}
        if self._adam:
            found["adam_steps"] = float(self._taken_in)
        return found if self._caution == 1.0 else found | {"caution": self._caution}

    def recall(self, updates: Sequence[Update], state: dict[str, Any]) -> None:
        """Go on after these updates, the last of which left this state."""
        self._past.recall([])
        for update in updates:
            self._past.add(update.pairs, (*update.pairs, *update.earlier))
        self.step = updates[-1].step + 1 if updates else 0
        if self._one_fifth:
            self._one_fifth.factor = float(state.get("sigma_factor", 1.0))
        self._caution = float(state.get("caution", 1.0))
        self._taken_in = int(state.get("adam_steps", 0))

    def to_json(self) -> str:
        """All that `from_json` needs to go on where this is; settings are not part of it."""
        return json.dumps({"step": self.step, "state": self.state(), "past": self._past.state()})

    def from_json(self, text: str) -> None:
        """Go on where a strategy of the same settings was."""
        found = json.loads(text)
        self.recall([], found["state"])
        self.step = found["step"]
        self._past.recall(found["past"])

"""The parts of a strategy, each against its equation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from estune.es.adaptation import Constraint, OneFifth
from estune.es.earlier import Momentum
from estune.es.evolution import EvolutionStrategy
from estune.es.guided import Guided
from estune.es.objective import Objective, best_of
from estune.es.schedule import Schedule
from estune.es.shaping import quantile, shape
from estune.es.sharpness import SharpnessAware

REWARDS = [0.5, 2.0, -1.0, 0.5, 7.0, 0.0, 1.0, 3.0]
rewards_of_8 = st.lists(st.integers(-50, 50).map(float), min_size=8, max_size=8).filter(lambda r: len(set(r)) > 1)


def standardized(values: list[float]) -> np.ndarray:
    found = np.asarray(values)
    return (found - found.mean()) / found.std()


@given(rewards_of_8)
def test_ranks_are_those_of_scipy_and_shared_by_equals(rewards: list[float]) -> None:
    expected = standardized(scipy.stats.rankdata(rewards))
    np.testing.assert_allclose(shape(rewards, "centered_ranks"), expected, atol=1e-6)


def test_shapings() -> None:
    assert shape(REWARDS, "raw") == pytest.approx(np.array(REWARDS) - np.mean(REWARDS))
    # A quarter of eight: the best two, 7 and 3.
    assert shape(REWARDS, "elite", 0.25) == pytest.approx(standardized([0, 0, 0, 0, 1, 0, 0, 1]))
    low, high = np.quantile(REWARDS, [0.125, 0.875])
    assert shape(REWARDS, "winsorized", 0.25) == pytest.approx(standardized(np.clip(REWARDS, low, high)))


@pytest.mark.parametrize(
    "rewards", [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]]
)
def test_the_worst_are_never_elite_and_of_other_equals_all(rewards: list[float]) -> None:
    assert shape(rewards, "elite", 0.25) == pytest.approx(standardized(rewards))


@given(rewards_of_8, st.sampled_from(["zscore", "centered_ranks", "winsorized", "elite"]))
def test_weights_have_mean_zero_and_variance_one(rewards: list[float], how: str) -> None:
    weights = shape(rewards, how)  # type: ignore[arg-type]
    assert np.mean(weights) == pytest.approx(0, abs=1e-9)
    to_one_value = how == "winsorized" and set(weights) == {0.0}
    assert np.var(weights) == pytest.approx(1, abs=1e-6) or to_one_value


@given(rewards_of_8)
def test_leaving_one_out_is_z_scoring(rewards: list[float]) -> None:
    r = np.array(rewards)
    others = (r.sum() - r) / (len(r) - 1)
    np.testing.assert_allclose(shape(rewards), standardized(list(r - others)), atol=1e-6)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_the_best_of_k_is_the_mean_over_all_subsets(scores: list[float], k: int) -> None:
    subsets = list(itertools.combinations(scores, min(k, len(scores))))
    assert best_of(scores, k) == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-9)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(np.quantile(values, q), abs=1e-9)


def test_pass_at_k() -> None:
    found = Objective(samples=4, best_of=2).fitness([[1, 0, 0, 0, 1, 1, 0, 0]])
    assert found == [pytest.approx((3 / 6 + 5 / 6) / 2)]  # 1 - C(3, 2) / C(4, 2) and 1 - C(2, 2) / C(4, 2)


def test_scores_are_compared_by_prompt_within_groups() -> None:
    scores = [[1.0, 0.0], [3.0, None], [5.0, 2.0], [5.0, 8.0]]
    assert Objective().fitness(scores, groups=2) == [0.5, 3.0, 3.5, 6.5]
    assert Objective(per_prompt="center").fitness(scores, groups=2) == [-0.5, 1.0, -1.5, 1.5]
    # 1 and 3 are one standard deviation from their mean, 5 and 5 none, 2 and 8 one.
    assert Objective(per_prompt="standardize").fitness(scores, groups=2) == [-0.5, 1.0, -0.5, 0.5]
    assert Objective(quantile=0.0).fitness(scores) == [0.0, 3.0, 2.0, 5.0]


@pytest.mark.parametrize("per_prompt", ["center", "standardize"])
def test_a_prompt_on_which_members_agree_makes_no_group_better_than_another(per_prompt: Any) -> None:
    """The mean of three times 0.1 is another number than 0.1."""
    assert sum([0.1] * 3) / 3 != 0.1
    assert Objective(per_prompt=per_prompt).fitness([[0.1]] * 3 + [[0.0]] * 3, groups=2) == [0.0] * 6


@pytest.mark.parametrize("per_prompt", ["none", "center", "standardize"])
def test_members_without_prompts_have_no_fitness(per_prompt: Any) -> None:
    assert Objective(per_prompt=per_prompt).fitness([[], []]) == [None, None]


def test_a_member_with_a_score_that_is_not_finite_has_failed_and_the_others_are_judged_without_it() -> None:
    scores = [[1.0, math.nan], [3.0, 1.0], [None, None], [1.0, 1.0]]
    assert Objective().fitness(scores) == [None, 2.0, None, 1.0]
    assert Objective(per_prompt="center").fitness(scores) == [None, 0.5, None, -0.5]


def test_schedules() -> None:
    cosine = Schedule("cosine", end=0.2, warmup=4)
    assert [cosine.factor(s, 14) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine.factor(9, 14) == pytest.approx(0.6)
    assert cosine.factor(14, 14) == cosine.factor(99, 14) == pytest.approx(0.2)
    assert [Schedule("linear").factor(s, 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert Schedule("constant", end=0.5).factor(3, 4) == 1


def test_alpha_follows_sigma_unless_it_is_given() -> None:
    falling = Schedule("linear", end=0.5)
    for given_rate, expected in ((None, 0.5 * 0.75 / 2), ("2sigma", 0.75), (0.1, 0.1)):
        rates: dict[str, Any] = {"learning_rate": given_rate, "sigma_schedule": falling}
        strategy = EvolutionStrategy(population=2, sigma=0.5, steps=2, **rates)
        strategy.tell([0.0, 1.0])
        assert (strategy.sigma, strategy.learning_rate) == (0.5 * 0.75, expected)


@pytest.mark.parametrize("population", [30, 60, 120])
def test_an_update_goes_as_far_with_any_larger_population(population: int) -> None:
    """Noise of different seeds is orthogonal: the length is that of the coefficients, half of sigma / sqrt(30)."""
    strategy = EvolutionStrategy(population=population, sigma=0.1)
    update = strategy.tell([math.sin(i) for i in range(population)])
    assert math.hypot(*update.coefficients) == pytest.approx(0.05 / math.sqrt(30), rel=2e-3)


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="such as 0.5sigma"):
        EvolutionStrategy(learning_rate="fast")


def test_the_one_fifth_rule() -> None:
    rule = OneFifth(rate=0.5)
    rule.tell([0.5, -0.5, -0.5, -0.5, -0.5])
    assert rule.factor == 1.0  # a fifth is better
    rule.tell([-0.5, -0.5])
    assert rule.factor == pytest.approx(math.exp(-0.1))
    rule.tell([0.0, 0.0])  # as good counts half
    rule.tell([])
    assert rule.factor == pytest.approx(math.exp(-0.1 + 0.15))
    for _ in range(99):
        rule.tell([1.0])
    assert rule.factor == 16.0

    strategy = EvolutionStrategy(population=2, sigma=0.1, adapt_sigma=True)
    assert [m.sign for m in strategy.ask()] == [1, 1, 0]
    strategy.tell([1.0, 2.0, 0.0])
    assert strategy.sigma == pytest.approx(0.1 * math.exp(0.4))
    again = EvolutionStrategy(population=2, sigma=0.1, adapt_sigma=True)
    again.recall([], strategy.state())
    assert again.sigma == strategy.sigma


def test_each_group_is_compared_with_the_base_on_its_own_prompts() -> None:
    strategy = EvolutionStrategy(population=4, sigma=0.1, adapt_sigma=True, groups=2)
    assert [m.sign for m in strategy.ask()] == [1, 1, 0, 1, 1, 0]
    assert len({m.seed for m in strategy.ask()}) == 4 + 1
    update = strategy.tell([1.0, 2.0, 1.5, 11.0, 12.0, 10.0])  # one of two is better, and both
    assert strategy.sigma == pytest.approx(0.1 * math.exp(0.5 * (3 / 4 - 1 / 5)))
    z = standardized([1.0, 2.0, 11.0, 12.0]) * 0.05 / 4
    assert update.coefficients == pytest.approx([z[0], z[1], 0, z[2], z[3], 0])
    strategy.tell([1.0, 2.0, None, 11.0, 12.0, 11.5])  # of the first group nothing is known
    assert strategy.sigma == pytest.approx(0.1 * math.exp(0.5 * (3 / 4 - 1 / 5 + 1 / 2 - 1 / 5)))


def test_a_constraint_is_paid_for_only_while_it_is_broken() -> None:
    constraint = Constraint(bound=20.0, rate=0.5)
    assert constraint.fitness([1.0, 1.0], [34.0, 10.0]) == [1.0, 1.0]
    assert constraint.multiplier == 0.5 * 2 / 12  # 22 on average, and members 12 from it
    constraint.multiplier = 0.5
    found = constraint.fitness([1.0, None, 1.0, 1.0, 1.0], [34.0, 10.0, None, math.nan, math.inf])
    assert found == [pytest.approx(1 - 0.5 * 14 / 12), None, None, None, None]
    constraint.multiplier = 0.5
    # Rewards are 2 from their mean, values 12: a deviation of the one costs half of one of the other.
    assert constraint.fitness([5.0, 1.0], [34.0, 10.0]) == pytest.approx([5 - 0.5 * 14 * 2 / 12, 1 + 0.5 * 10 * 2 / 12])
    at_least = Constraint(bound=0.5, at_most=False, multiplier=1.0)
    assert at_least.fitness([0.0, 0.0], [0.25, 0.75]) == [-1.0, 1.0]


def test_a_constraint_that_is_far_from_its_bound_moves_by_its_rate_at_most() -> None:
    constraint = Constraint(bound=20.0, rate=0.5, multiplier=1.2)
    for multiplier in (0.7, 0.2, 0.0, 0.0):
        constraint.fitness([1.0, 2.0], [10.0, 10.1])
        assert constraint.multiplier == pytest.approx(multiplier)
    for multiplier in (0.5, 1.0):
        assert constraint.fitness([1.0, 2.0, 4.0], [30.6] * 3) == [1.0, 2.0, 4.0]  # none is dearer than another
        assert constraint.multiplier == multiplier
    constraint.fitness([1.0, 2.0], [20.0, 20.0])
    assert constraint.multiplier == 1.0
    # Of rewards that are alike, though their mean is another than they are, the penalty is all that counts.
    assert constraint.fitness([0.1] * 3, [30.0, 20.0, 10.0]) == pytest.approx([0.1 - 1.5**0.5, 0.1, 0.1 + 1.5**0.5])
    assert constraint.fitness([1.0, 2.0], [20.0, math.nextafter(20.0, 21.0)]) == [1.0, 2.0]
    constraint.multiplier = 1.0
    assert constraint.fitness([1.0, None], [None, math.nan]) == [1.0, None]
    assert constraint.multiplier == 1.0


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=9), st.sampled_from([1e-3, 7.0]))
def test_neither_scale_of_a_constraint_matters(members: list[tuple[float, float]], times: float) -> None:
    rewards, values = [reward for reward, _ in members], [value for _, value in members]
    assume(all(len(set(each)) > 1 and max(each) - min(each) > 1e-3 for each in (rewards, values)))
    plain, scaled = Constraint(1.0, multiplier=0.7), Constraint(times, multiplier=0.7)
    assert scaled.fitness(rewards, [times * v for v in values]) == pytest.approx(plain.fitness(rewards, values))
    assert scaled.multiplier == pytest.approx(plain.multiplier)
    scaled = Constraint(1.0, multiplier=0.7)
    plain.multiplier = 0.7
    found = scaled.fitness([times * r for r in rewards], values)
    assert found == pytest.approx([None if f is None else times * f for f in plain.fitness(rewards, values)])


def test_a_constraint_compares_members_that_have_the_same_prompts() -> None:
    constraint = Constraint(bound=10.0, rate=0.5, multiplier=1.0)
    # Two groups, the second's prompts cost more: each has a member one below its mean and one above, 14 is all's.
    assert constraint.fitness([0.0] * 4, [12.0, 14.0, 14.0, 16.0], groups=2) == pytest.approx([-3.0, -5.0] * 2)
    assert constraint.multiplier == 1.5
    constraint.multiplier = 1.0
    found = constraint.fitness([0.0, 1.0, 0.0, None], [12.0, 14.0, None, None], groups=2)
    spread = 1.0, math.sqrt((0.25 + 0.25) / 3)
    assert found == pytest.approx(
        [-2 * spread[1] / spread[0], 1 - 4 * spread[1] / spread[0], -3 * spread[1] / spread[0], None]
    )


def test_momentum_is_the_moving_average_of_steps() -> None:
    strategy = EvolutionStrategy(population=2, sigma=1e6, learning_rate=0.5, momentum=Momentum(0.5))
    updates = [strategy.tell([0.0, 1.0]) for _ in range(7)]
    own = [0.5 / 2 * 0.5 * sign for sign in (-1, 1)]
    assert updates[0].earlier == ()
    assert updates[0].coefficients == pytest.approx(own)
    # 0.5^4 is the last above 5%.
    expected = [
        (m.seed, pytest.approx(0.5**back * c))
        for back in range(1, 5)
        for m, c in zip(updates[6 - back].members, own, strict=True)
    ]
    assert list(updates[6].earlier) == expected
    assert updates[6].factors == pytest.approx([0.5, 0.25, 0.125, 0.0625])

    # What was measured around a base that lies far away counts less: here it moved by a whole sigma and element.
    strategy = EvolutionStrategy(population=2, sigma=1.0, learning_rate=2**0.5, momentum=Momentum(0.5, 1))
    first = strategy.tell([0.0, 1.0])
    assert sum(c * c for c in first.coefficients) == pytest.approx(0.25)
    assert strategy.tell([0.0, 1.0]).factors == pytest.approx([0.5 * math.exp(-0.125)])


def test_a_mirrored_pair_moves_the_base_along_one_direction() -> None:
    parts: dict[str, Any] = {"population": 4, "mirrored": True, "sigma": 1.0, "learning_rate": 1.0}
    strategy = EvolutionStrategy(**parts, momentum=Momentum(0.5, 1))
    first = strategy.tell([1.0, 0.0, 1.0, 0.0])
    assert [c for _, c in first.pairs] == pytest.approx([0.125] * 4)  # a quarter along each of two
    assert strategy.tell([1.0, 0.0, 1.0, 0.0]).factors == pytest.approx([0.5 * math.exp(-(0.25**2))])
    even = EvolutionStrategy(**parts, momentum=Momentum(0.5, 1))
    even.tell([1.0, 1.0, 0.0, 0.0])  # both signs are as good
    assert even.tell([1.0, 0.0, 1.0, 0.0]).factors == (0.5,)


def test_decay_goes_the_whole_way_at_most() -> None:
    update = EvolutionStrategy(population=2, learning_rate=0.5, weight_decay=3.0, anchor_decay=4.0).tell([0.0, 1.0])
    assert (update.decay, update.anchor) == (-1.0, 1.0)


def test_where_nothing_is_learned_nothing_moves() -> None:
    strategy = EvolutionStrategy(population=2, momentum=Momentum(0.5), weight_decay=0.5, anchor_decay=0.5)
    strategy.tell([0.0, 1.0])
    update = strategy.tell([1.0, 1.0])
    assert (set(update.coefficients), update.earlier, update.decay, update.anchor) == ({0.0}, (), 0.0, 0.0)
    assert update.factors == ()
    assert len(strategy.tell([0.0, 1.0]).earlier) == 2  # of the step before the last


def test_a_strategy_goes_on_from_json_as_if_it_had_never_stopped() -> None:
    def strategy() -> EvolutionStrategy:
        return EvolutionStrategy(population=4, seed=3, sigma=0.1, momentum=Momentum(0.7), adapt_sigma=True, steps=9)

    def rewards(step: int) -> list[float]:
        return [math.sin(step * 5 + i) for i in range(5)]

    whole, first = strategy(), strategy()
    expected = [whole.tell(rewards(step)) for step in range(8)]
    for step in range(3):
        first.tell(rewards(step))
    second = strategy()
    second.from_json(first.to_json())
    assert [second.tell(rewards(step)) for step in range(3, 8)] == expected[3:]
    assert second.sigma == whole.sigma


def test_a_strategy_goes_on_from_its_updates_as_if_it_had_never_stopped() -> None:
    def strategy() -> EvolutionStrategy:
        return EvolutionStrategy(population=2, sigma=0.5, learning_rate=1.0, momentum=Momentum(0.7, 3))

    whole = strategy()
    updates = [whole.tell([float(step), 2.0]) for step in (0, 1, 0, 1, 0)]
    again = strategy()
    again.recall(updates[:4], whole.state())
    assert again.tell([0.0, 2.0]) == updates[4]
    assert updates[4].factors[1] < 0.7**2 * 0.9  # how far the base has moved since counts, earlier steps' terms too


def test_guided_members_look_as_far_as_others_and_as_much_along_the_past_as_they_are_to() -> None:
    """Each seed's noise is an axis of its own: what is summed up is the variance of an element of the perturbation."""
    strategy = EvolutionStrategy(population=200, guided=Guided(0.4, 2))
    assert {(m.own, m.along) for m in strategy.ask()} == {(1.0, ())}
    strategy.tell([float(i % 7) for i in range(200)])
    strategy.tell([float(i % 5) for i in range(200)])
    members = strategy.ask()
    along = [sum(c * c for _, c in m.along) for m in members]
    assert members[0].own ** 2 == pytest.approx(0.6)
    assert np.mean(along) == pytest.approx(0.4, rel=0.25)
    assert len({seed for seed, _ in members[0].along}) > 300  # those of both steps, but for the mean rewards
    again = EvolutionStrategy(population=200, guided=Guided(0.4, 2))
    again.from_json(strategy.to_json())
    assert again.ask() == members


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_sharpness_aware_step_goes_down_and_then_up_from_where_it_was(mirrored: bool) -> None:
    parts: dict[str, Any] = {"population": 4, "sigma": 0.5, "learning_rate": 0.1, "mirrored": mirrored}
    strategy = EvolutionStrategy(**parts, sharpness=SharpnessAware(0.2), weight_decay=0.5, anchor_decay=0.5)
    rewards = [0.0, 1.0, 5.0, 2.0]
    down = strategy.tell(rewards)
    assert strategy.displaced
    of_noise: dict[int, float] = {}
    for seed, c in down.pairs:
        of_noise[seed] = of_noise.get(seed, 0.0) + c
    assert math.hypot(*of_noise.values()) == pytest.approx(0.2 * 0.5)  # of a weight, as noise of seeds is orthogonal
    up = strategy.tell(rewards)
    assert not strategy.displaced
    assert list(up.earlier) == [(seed, -c) for seed, c in down.pairs]
    expected = standardized(rewards) * [m.sign for m in up.members]
    assert up.coefficients == pytest.approx(0.1 / 4 * expected)
    worse = [m.sign * c for m, c in zip(down.members, down.coefficients, strict=True)]
    assert np.corrcoef(worse, rewards)[0, 1] == pytest.approx(-1)
    assert (down.decay, down.anchor, up.decay, up.anchor) == (pytest.approx(-0.05), pytest.approx(0.05), 0.0, 0.0)


def test_the_way_down_is_taken_back_where_nothing_is_learned_there() -> None:
    def strategy() -> EvolutionStrategy:
        return EvolutionStrategy(population=2, sharpness=SharpnessAware(0.2))

    whole = strategy()
    down, up = whole.tell([0.0, 1.0]), whole.tell([1.0, 1.0])
    assert up.pairs == ()
    assert list(up.earlier) == [(seed, -c) for seed, c in down.pairs]
    assert [whole.tell([1.0, 1.0]).pairs, whole.tell([1.0, 1.0]).earlier] == [(), ()]
    even = EvolutionStrategy(population=4, mirrored=True, sharpness=SharpnessAware(0.2))
    assert even.tell([0.0, 0.0, 1.0, 1.0]).pairs == ()  # both signs are as good: there is no way down
    again = strategy()
    again.recall([down], whole.state())
    assert again.displaced
    assert again.tell([1.0, 1.0]) == up

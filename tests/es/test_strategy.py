"""The strategy against the paper's formula, and against what goes wrong in practice."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.es.evolution import EvolutionStrategy
from estune.es.schedule import Schedule
from estune.es.strategy import member_seed

rewards_of_30 = st.lists(st.floats(-10, 10), min_size=30, max_size=30).filter(lambda r: np.ptp(r) > 1e-3)


@given(rewards_of_30)
@settings(max_examples=50)
def test_coefficients_are_the_papers(rewards: list[float]) -> None:
    update = EvolutionStrategy(sigma=0.001).tell(rewards)
    r = np.array(rewards)
    z = (r - r.mean()) / (r.std(ddof=0) + 1e-8)
    np.testing.assert_allclose(update.coefficients, 0.0005 / 30 * z, rtol=1e-6, atol=1e-12)
    assert update.decay == 0.0


def test_coefficients_are_float32() -> None:
    update = EvolutionStrategy(learning_rate=0.1, weight_decay=0.01).tell([i**0.5 for i in range(30)])
    for value in (*update.coefficients, update.decay):
        assert value == float(np.float32(value))
    assert update.decay == float(np.float32(-0.001))


def test_defaults_are_the_papers() -> None:
    strategy = EvolutionStrategy()
    assert (strategy.population, strategy.sigma, strategy.learning_rate) == (30, 0.001, 0.0005)
    assert len(strategy.ask()) == 30
    assert {m.sign for m in strategy.ask()} == {1}


def test_seeds_are_64_bit_and_never_collide() -> None:
    seeds = {member_seed(run, step, index) for run in (0, 1, 2) for step in range(300) for index in range(100)}
    assert len(seeds) == 3 * 300 * 100
    assert all(0 <= s < 2**64 for s in seeds)
    high_bits = {s >> 48 for s in seeds}
    assert len(high_bits) > 40_000  # spread over the whole range, not counted up


def test_seeds_depend_on_run_step_and_index_only() -> None:
    a, b = EvolutionStrategy(seed=5), EvolutionStrategy(seed=5, sigma=0.1)
    a.tell([1.0] * 29 + [2.0])
    b.tell([3.0] * 29 + [1.0])
    assert a.ask() == b.ask() == a.ask()
    assert a.ask() != EvolutionStrategy(seed=5).ask()
    assert {m.seed for m in a.ask()}.isdisjoint(m.seed for m in EvolutionStrategy(seed=6).ask())


@pytest.mark.parametrize("value", [0.0, 0.3, -1e9, 1e-9])
def test_equal_rewards_do_not_move(value: float, caplog: pytest.LogCaptureFixture) -> None:
    assert EvolutionStrategy(weight_decay=0.5).tell([value] * 30).decay == 0.0
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        update = EvolutionStrategy().tell([value] * 30)
    assert set(update.coefficients) == {0.0}
    assert caplog.text == ""  # three such steps in a row are remarked on, by the run


def test_failed_members_are_left_out_and_the_rest_renormalised(caplog: pytest.LogCaptureFixture) -> None:
    valid = [0.1 * i for i in range(26)]
    rewards = [None, *valid[:10], math.nan, *valid[10:], math.inf, None]
    with caplog.at_level(logging.WARNING):
        update = EvolutionStrategy(learning_rate=1.0).tell(rewards)
    assert "4 of 30 members failed" in caplog.text
    r = np.array(valid)
    expected = (r - r.mean()) / (r.std() + 1e-8) / 26
    kept = [
        c
        for c, reward in zip(update.coefficients, rewards, strict=True)
        if reward is not None and math.isfinite(reward)
    ]
    np.testing.assert_allclose(kept, expected, rtol=1e-6)
    assert [update.coefficients[i] for i in (0, 11, 28, 29)] == [0.0] * 4


@pytest.mark.parametrize("rewards", [[None] * 30, [None] * 29 + [1.0]])
def test_too_few_rewards_do_not_move(rewards: list[float | None]) -> None:
    assert set(EvolutionStrategy().tell(rewards).coefficients) == {0.0}


def test_mirrored_members_come_in_pairs() -> None:
    strategy = EvolutionStrategy(population=4, mirrored=True, learning_rate=1.0)
    members = strategy.ask()
    assert [m.sign for m in members] == [1, -1, 1, -1]
    assert members[0].seed == members[1].seed != members[2].seed == members[3].seed
    update = strategy.tell([1.0, 0.0, 0.0, 1.0])  # the first direction helps, the second hurts
    assert update.coefficients == (0.25, 0.25, -0.25, -0.25)


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        strategy = EvolutionStrategy(population=2, learning_rate=1.0, steps=4, lr_schedule=Schedule(schedule))  # type: ignore[arg-type]
        found = []
        for _ in range(4):
            found.append(strategy.learning_rate)
            strategy.tell([0.0, 1.0])
        return found

    assert rates("constant") == [1.0] * 4
    assert rates("linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0}, {"sigma": math.nan}, {"population": 1}, {"population": 3, "mirrored": True}]
)
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        EvolutionStrategy(**wrong)  # type: ignore[arg-type]
    for groups in (0, 4):
        with pytest.raises(ValueError, match=f"population 12 makes no {groups} groups of equal size, in pairs"):
            EvolutionStrategy(population=12, mirrored=True, groups=groups)
    with pytest.raises(ValueError, match="3 rewards for 30 members"):
        EvolutionStrategy().tell([1.0, 2.0, 3.0])

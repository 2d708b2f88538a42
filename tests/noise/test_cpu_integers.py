"""Steps of integer weights against NumPy, there and back, and in any split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import cpu_integers, reference
from estune.noise.integers import Levels, Steps
from estune.weights.grid import FULL, Grid
from tests.grids import RANGES, Latent, moves

NAME = "model.layers.0.mlp.up_proj.weight"
KEY = reference.tensor_id(NAME)
GROUPS = [16, 64, 256]
bits = pytest.mark.parametrize("bits", [8, 4])


def drawn(groups: int, group: int, bits: int, seed: int = 0) -> tuple[Any, Any]:
    """Codes of all values, as stored, and scales of both signs."""
    random = np.random.default_rng(seed)
    low, high, _ = RANGES[bits]
    codes = random.integers(low, high + 1, groups * group).astype(np.int8)
    scales = (random.uniform(0.01, 0.05, groups) * random.choice([-1, 1], groups)).astype(np.float32)
    return Grid(bits, group, 1).pack(codes), scales


def unpacked(codes: Any) -> Any:
    if codes.dtype == np.int8:
        return codes.astype(int)
    halves = np.stack([codes & 15, codes >> 4], axis=1).ravel().astype(int)
    return np.where(halves > 7, halves - 16, halves)


def some_pairs(random: Any) -> list[tuple[int, float]]:
    return [(int(random.integers(0, 2**63)), float(np.float32(random.normal(0, 0.01)))) for _ in range(3)]


@bits
@given(st.integers(0, 2**64 - 1), st.integers(1, 300), st.sampled_from(GROUPS), st.integers(0, 40))
@settings(max_examples=30)
def test_a_shift_is_the_rounded_noise_and_goes_back(bits: int, seed: int, groups: int, group: int, first: int) -> None:
    codes, scales = drawn(groups, group, bits)
    before = codes.copy()
    levels = Levels(*RANGES[bits])
    for sign in (1, -1):
        cpu_integers.shift(codes, scales, seed, KEY, first * group, 0.02, sign, levels)
        expected = unpacked(before) + sign * moves(seed, KEY, first * group, scales, group, 0.02, bits)
        np.testing.assert_array_equal(unpacked(codes), expected)
        cpu_integers.shift(codes, scales, seed, KEY, first * group, 0.02, -sign, levels)
        np.testing.assert_array_equal(codes, before)


@bits
@given(st.integers(0, 2**64 - 1), st.integers(1, 300), st.sampled_from(GROUPS), st.sampled_from([0.02, 0.5, 1e6]))
@settings(max_examples=30)
def test_codes_end_where_their_type_does_and_go_back(bits: int, seed: int, groups: int, group: int, sigma: Any) -> None:
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    random = np.random.default_rng(groups)
    before = random.choice([least, least + 1, 0, most], groups * group).astype(np.int8)
    scales = (random.uniform(0.01, 0.05, groups) * random.choice([-1, 1], groups)).astype(np.float32)
    codes = Grid(bits, group, 1).pack(before.copy())
    kept = codes.copy()
    levels = FULL[bits]
    for sign in (1, -1):
        cuts = cpu_integers.shift(codes, scales, seed, KEY, 0, sigma, sign, levels)
        wanted = before + sign * moves(seed, KEY, 0, scales, group, sigma, bits).astype(int)
        np.testing.assert_array_equal(unpacked(codes), wanted.clip(least, most))
        assert len(cuts) == np.count_nonzero((wanted < least) | (wanted > most))
        none = cpu_integers.shift(codes, scales, seed, KEY, 0, sigma, -sign, levels)
        assert not none.size
        cpu_integers.give_back(codes, cuts)
        np.testing.assert_array_equal(codes, kept)


@bits
def test_the_largest_steps_fit_and_go_back(bits: int) -> None:
    codes, scales = drawn(100, 64, bits)
    before = codes.copy()
    levels = Levels(*RANGES[bits])
    cpu_integers.shift(codes, scales, 5, KEY, 0, 1e6, 1, levels)
    assert set(np.abs(unpacked(codes) - unpacked(before))) == {levels.reach}
    cpu_integers.shift(codes, scales, 5, KEY, 0, 1e6, -1, levels)
    np.testing.assert_array_equal(codes, before)


def test_steps_are_the_noise_on_average() -> None:
    scales = np.full(4, 0.03, np.float32)
    noise = np.array([reference.normal_by_id(seed, KEY, 0, 64) for seed in range(1000)]) * 0.01 / 0.03
    found = np.array([moves(seed, KEY, 0, scales, 16, 0.01, 8) for seed in range(1000)])
    # Var(round(x)) = frac(x) (1 - frac(x)) <= 1/4, independent of the noise's own.
    assert abs(np.mean(found - noise)) < 5 * 0.5 / np.sqrt(found.size)
    assert np.mean(found * noise) == pytest.approx(np.mean(noise**2), rel=0.06)


@bits
@pytest.mark.parametrize("stochastic", [True, False])
@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from(GROUPS))
@settings(max_examples=15)
def test_advance_carries_on_what_is_cut_off(bits: int, stochastic: bool, updates: int, groups: int, group: int) -> None:
    codes, scales = drawn(groups, group, bits, updates)
    random = np.random.default_rng(groups)
    made = [(some_pairs(random), 0.02) for _ in range(updates)]
    expected = Latent(np.zeros(groups * group, np.float32), NAME, group, bits, 100, stochastic=stochastic)
    expected.codes, expected.scales = unpacked(codes), scales
    kept, again = codes.copy(), codes.copy()
    error = np.full(groups * group, np.nan, np.float32)
    levels = Levels(*RANGES[bits])
    dither = 99 if stochastic else None
    for number, (pairs, sigma) in enumerate(made):
        expected.apply(pairs, sigma, 99)
        one, all_ = Steps.of(made[number : number + 1]), Steps.of(made[: number + 1])
        cpu_integers.advance(kept, scales, one, KEY, 0, levels, error=error, fresh=number == 0, dither_seed=dither)
        cut = groups // 2  # the same in two runs, without anything kept
        for part in (slice(0, cut), slice(cut, groups)):
            if part.start < part.stop:
                at = slice(part.start * group * bits // 8, part.stop * group * bits // 8)
                cpu_integers.advance(again[at], scales[part], all_, KEY, part.start * group, levels, dither_seed=dither)
        np.testing.assert_array_equal(unpacked(kept), expected.codes)
        np.testing.assert_array_equal(again, kept)
        np.testing.assert_array_equal(error, expected.error)


def test_small_steady_updates_come_to_what_they_add_up_to() -> None:
    """40 updates by a hundredth of a step for each step of the member: carried on 0.4 in all, on average."""
    moved = {}
    scales = np.full(1024, 0.02, np.float32)
    levels = Levels(*RANGES[4])
    made = [([(7, 0.01 * 0.02)], 0.02)] * 40
    member = moves(7, KEY, 0, scales, 16, 0.02, 4)
    for name, window, dither in (("carried", 40, 3), ("to nearest", 40, None), ("not carried", 1, None)):
        codes = np.zeros(1024 * 16, np.int8)
        for number in range(40):
            window_of = made[number - number % window : number + 1]
            cpu_integers.advance(codes, scales, Steps.of(window_of), KEY, 0, levels, dither_seed=dither)
        moved[name] = float(np.mean(codes[member != 0] * member[member != 0]))
    assert moved["carried"] == pytest.approx(0.4, abs=5 * 0.5 / np.sqrt(np.sum(member != 0)))
    assert moved["to nearest"] == 0.0  # 0.4 is less than half a step
    assert moved["not carried"] == 0.0


@bits
@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.float16])
def test_values_are_codes_times_scales_rounded_once(bits: int, dtype: Any) -> None:
    import torch

    codes, scales = drawn(100, 64, bits)
    exact = (unpacked(codes).astype(np.float32).reshape(-1, 64) * scales[:, None]).ravel()
    found = np.empty(6400, dtype)
    cpu_integers.values(codes, scales, found)
    if dtype == np.uint16:
        np.testing.assert_array_equal(found, torch.from_numpy(exact).bfloat16().view(torch.uint16).numpy())
    else:
        np.testing.assert_array_equal(found, exact.astype(dtype))

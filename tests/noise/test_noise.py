"""The noise against its published known answers, against the NumPy reference, and as a random variable."""

from __future__ import annotations

import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.noise import cpu, cpu_draw, cpu_sums, normal, reference
from estune.noise.rows import Rows

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "noise_vectors.json").read_text())
NAME = "model.layers.0.self_attn.q_proj.weight"
KEY = reference.tensor_id(NAME)

seeds = st.integers(0, 2**64 - 1)
starts = st.one_of(st.integers(0, 9000), st.integers(2**34 - 5000, 2**34 + 10), st.integers(0, 2**50))
# The chunk of the kernel is 4,096 elements: sizes on both sides of one and two of them.
sizes = st.one_of(st.integers(0, 20), st.integers(4080, 4110), st.integers(8180, 8200))


def bits(values: Any) -> Any:
    return np.asarray(values).view(np.uint32)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Random123's known answers for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_answers(counter: Any, key: Any, words: Any) -> None:
    seed = key[0] | key[1] << 32
    got = reference.philox(tuple(np.array([c], np.uint32) for c in counter), seed)
    assert tuple(int(w[0]) for w in got) == words
    # The compiled kernel, through its own entry: block = counter's low half, tensor = its high half.
    compiled = [np.empty(1, np.uint32) for _ in range(4)]
    block, tensor = (np.uint64(counter[i] | counter[i + 1] << 32) for i in (0, 2))
    cpu_draw.random_words(np.uint64(seed), tensor, block, *compiled)
    assert tuple(int(w[0]) for w in compiled) == words


def test_tensor_ids() -> None:
    for name, digest in VECTORS["tensor_id"].items():
        assert f"{reference.tensor_id(name):016x}" == digest


def test_known_answers() -> None:
    for v in VECTORS["vectors"]:
        for value in (
            normal(v["seed"], v["tensor"], v["index"], 1),
            reference.normal_by_id(v["seed"], reference.tensor_id(v["tensor"]), v["index"], 1),
        ):
            assert f"{int(bits(value)[0]):08x}" == v["bits"], v


@given(seed=seeds, start=starts, size=sizes)
@settings(max_examples=60)
def test_compiled_noise_is_the_reference(seed: int, start: int, size: int) -> None:
    assert np.array_equal(bits(normal(seed, NAME, start, size)), bits(reference.normal_by_id(seed, KEY, start, size)))


def test_a_million_elements_are_the_reference() -> None:
    assert np.array_equal(bits(normal(7, NAME, 5, 1 << 20)), bits(reference.normal_by_id(7, KEY, 5, 1 << 20)))


@given(seed=seeds, start=st.integers(0, 100), cuts=st.lists(st.integers(0, 9000), max_size=6))
@settings(max_examples=30)
def test_any_split_over_any_threads_gives_the_same_bits(seed: int, start: int, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 9000]
    whole = normal(seed, NAME, start, 9000)
    with ThreadPoolExecutor(3) as threads:
        parts = threads.map(lambda ab: normal(seed, NAME, start + ab[0], ab[1] - ab[0]), pairwise(edges))
    assert np.array_equal(bits(whole), bits(np.concatenate(list(parts))))


def to_bfloat16(x: float) -> int:
    """Nearest bfloat16, ties to even, by exact arithmetic over the two neighbours."""
    b = int(np.float32(x).view(np.uint32))
    low = b & 0xFFFF0000
    value, below, above = (Fraction(float(np.uint32(v).view(np.float32))) for v in (b, low, low + 0x10000))
    toward = abs(value - below) - abs(above - value)
    up = toward > 0 or (toward == 0 and (low >> 16) & 1)
    return (low >> 16) + int(up)


def widened(stored: Any) -> Any:
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored


def weights(size: int, dtype: str, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(0, 0.05, size).astype(np.float32)
    return (bits(values) >> 16).astype(np.uint16) if dtype == "bfloat16" else values


def stored(values: Any, dtype: str) -> Any:
    return values if dtype == "float32" else np.array([to_bfloat16(v) for v in values], np.uint16)


@pytest.mark.parametrize(("base_type", "live_type"), [("float32",) * 2, ("float32", "bfloat16"), ("bfloat16",) * 2])
@given(seed=seeds, start=st.integers(0, 9), size=st.integers(0, 300))
@settings(max_examples=15)
def test_perturb(base_type: str, live_type: str, seed: int, start: int, size: int) -> None:
    base = weights(size, base_type)
    live = np.zeros(size, np.float32 if live_type == "float32" else np.uint16)
    cpu.perturb(live, base, seed, KEY, start, 0.01)
    expected = widened(base) + np.float32(0.01) * reference.normal_by_id(seed, KEY, start, size)
    assert np.array_equal(live, stored(expected, live_type))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(start=st.integers(0, 9), size=st.sampled_from([0, 1, 5, 4099]), members=st.integers(0, 5))
@settings(max_examples=15)
def test_update(dtype: str, start: int, size: int, members: int) -> None:
    base = weights(size, dtype)
    old = widened(base.copy())
    coefficients = np.linspace(-0.02, 0.03, members, dtype=np.float32)
    member_seeds = np.arange(members, dtype=np.uint64) + np.uint64(2**40)
    total = np.zeros(size, np.float32)
    for seed, c in zip(member_seeds, coefficients, strict=True):
        total = total + c * reference.normal_by_id(int(seed), KEY, start, size)
    cpu.update(base, member_seeds, coefficients, KEY, start, decay=-0.001)
    assert np.array_equal(base, stored(old + (np.float32(-0.001) * old + total), dtype))


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    size, change = 200_000, np.float32(1e-4)  # an eighth of the spacing of bfloat16 at 0.25 to 0.5 is 2.4e-4
    base = np.full(size, (bits(np.float32([0.3])) >> 16)[0], np.uint16)
    none, no_coefficients = np.empty(0, np.uint64), np.empty(0, np.float32)
    decay = float(change / widened(base)[0])
    results = []
    for rounding_seed in (1, 1, 2):
        rounded = base.copy()
        cpu.update(rounded, none, no_coefficients, KEY, 3, decay, rounding_seed)
        results.append(rounded)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    moved = widened(results[0]).astype(np.float64).mean() - float(widened(base)[0])
    step = 2.0**-9  # spacing of bfloat16 there
    sigma = step / math.sqrt(size) / 2
    assert abs(moved - float(change)) < 5 * sigma
    to_nearest = base.copy()
    cpu.update(to_nearest, none, no_coefficients, KEY, 3, decay)
    assert np.array_equal(to_nearest, base)  # what stochastic rounding is for: nearest loses the change


def test_moments_and_distribution() -> None:
    sample = normal(123, NAME, 0, 1 << 21).astype(np.float64)
    n = sample.size
    assert abs(sample.mean()) < 4 / math.sqrt(n)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((sample**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((sample**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert 4.5 < np.abs(sample).max() < 5.78
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(sample, "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, NAME, 0), (2, NAME, 0)),
        ((1, NAME, 0), (1 | 1 << 32, NAME, 0)),
        ((1, NAME, 0), (1, NAME.replace("q_proj", "k_proj"), 0)),
        ((1, NAME, 0), (1, NAME, 1)),
        ((1, NAME, 0), (1, NAME, 1 << 18)),
        ((1, NAME, 0), (1, NAME, 1 << 34)),
    ],
    ids=["seed", "seed's high half", "tensor", "next element", "further on", "beyond 32 bits"],
)
def test_independence(one: Any, other: Any) -> None:
    n = 1 << 18
    a, b = (normal(*which, n).astype(np.float64) for which in (one, other))
    for x, y in ((a, b), (a**2 - 1, b**2 - 1)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / math.sqrt(n)


def test_out_of_range_is_refused() -> None:
    for arguments in ((-1, NAME, 0, 1), (2**64, NAME, 0, 1), (0, NAME, -1, 1), (0, NAME, 0, -1)):
        with pytest.raises(ValueError, match="64-bit"):
            normal(*arguments)


@pytest.mark.parametrize("size", [0, 1, 4097, 8199])
@pytest.mark.parametrize("rows", [Rows(1, 7, 3), Rows(7, 20, 3), Rows(4095, 4099, 5), Rows(4097, 9001, 4096)])
def test_columns_of_a_tensor_have_what_is_at_their_positions(rows: Rows, size: int) -> None:
    """In rows of one element, and in some that are narrower or wider than a chunk."""
    start = 5
    elements = rows.skip + np.arange(size)
    positions = start + elements // rows.width * rows.pitch + elements % rows.width
    base = np.linspace(-1, 1, size, dtype=np.float32)
    noise = [reference.normal_by_id(seed, KEY, 0, start + 8205 * 7)[positions] for seed in (3, 4)]
    live = np.empty_like(base)
    cpu.perturb(live, base, 3, KEY, start, 0.01, rows)
    np.testing.assert_array_equal(live, base + np.float32(0.01) * noise[0])
    changed = base.copy()
    factors = np.array([0.5, -0.25], np.float32)
    cpu.update(changed, np.array([3, 4], np.uint64), factors, KEY, start, decay=0.0, rows=rows)
    np.testing.assert_array_equal(changed, base + (factors[0] * noise[0] + factors[1] * noise[1]))
    alone = (cpu_sums.fingerprint(base[i : i + 1], KEY, int(at)) for i, at in enumerate(positions))
    assert cpu_sums.fingerprint(base, KEY, start, rows) == sum(alone) % 2**64


@given(cut=st.integers(0, 5000), dtype=st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=20)
def test_fingerprints_of_runs_add_up(cut: int, dtype: str) -> None:
    array = weights(5000, dtype)
    whole = cpu_sums.fingerprint(array, KEY, 10)
    assert (
        whole == (cpu_sums.fingerprint(array[:cut], KEY, 10) + cpu_sums.fingerprint(array[cut:], KEY, 10 + cut)) % 2**64
    )


def test_fingerprint_sees_every_change() -> None:
    array = weights(1000, "float32")
    seen = {
        cpu_sums.fingerprint(array, KEY, 0),
        cpu_sums.fingerprint(array, KEY, 1),
        cpu_sums.fingerprint(array, KEY + 1, 0),
    }
    for i in range(1000):
        changed = array.copy()
        changed.view(np.uint32)[i] ^= 1
        seen.add(cpu_sums.fingerprint(changed, KEY, 0))
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    seen.add(cpu_sums.fingerprint(swapped, KEY, 0))
    assert len(seen) == 1004


@pytest.mark.parametrize("stored_type", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base_type", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [0, 1, 1025, cpu_sums.SQUARES_BLOCK, 2 * cpu_sums.SQUARES_BLOCK + 5])
def test_squares_are_summed_in_the_order_that_is_told(size: int, base_type: str, stored_type: str) -> None:
    now, then = (
        values.astype(np.float16) if dtype == "float16" else values
        for values, dtype in ((weights(size, base_type, 1), base_type), (weights(size, stored_type, 2), stored_type))
    )
    a, b = (widened(values).astype(np.float32) for values in (now, then))
    blocks = []
    for first in range(0, size, cpu_sums.SQUARES_BLOCK):
        rows = []
        for start in range(first, min(first + cpu_sums.SQUARES_BLOCK, size), cpu_sums.SQUARES_LANES):
            part = slice(start, min(start + cpu_sums.SQUARES_LANES, first + cpu_sums.SQUARES_BLOCK))
            row = np.zeros((2, cpu_sums.SQUARES_LANES))
            row[0, : len(a[part])] = (a[part] - b[part]).astype(np.float64) ** 2
            row[1, : len(a[part])] = b[part].astype(np.float64) ** 2
            rows.append(row)
        lanes = functools.reduce(np.add, rows, np.zeros((2, cpu_sums.SQUARES_LANES)))
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        blocks.append(lanes[:, 0])
    assert np.array_equal(cpu_sums.squares(now, then), np.array(blocks).reshape(-1, 2))

"""The kernels of low-rank noise against the CPU's, bit for bit, interpreted; on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from estune.es.update import Terms
from estune.noise.rows import Rows, Run
from estune.weights import passes

pytest.importorskip("triton")
pytest.importorskip("tests.interpreted")
from estune.noise import gpu, gpu_low_rank, reference
from tests.noise.test_noise_gpu import BRAIN, DEVICE, FLOAT, HALF, KEY, ON_GPU, SEEDS, TYPES, array, weights

SEED = 2**64 - 1
COEFFICIENTS = [0.1, -0.2, 0.3]
# Columns of the matrix, first element, elements: whole counters of a row, and not; beginning anywhere; far off; wide.
STRETCHES = [
    *[(8, 12, 100), (12, 36, 268), (2000, 1996, 8), (7, 3, 90), (2, 1, 1), (3, 2**34 - 9, 20), (5, 0, 0)],
]
# Columns, first element, elements, and the rows that they are: of whole counters, of parts, of every second row.
RECTANGLES: list[tuple[int, int, int, Rows]] = [
    (12, 16, 40, Rows(4, 12, 4)),
    (8, 20, 12, Rows(4, 16, 4)),
    (90, 5, 40, Rows(37, 90, 3)),
    (8, 4, 16, Rows(8, 24)),  # rows that reach over an end of the matrix'
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few elements, as the interpreter is slow."""
    if not ON_GPU:
        monkeypatch.setattr(gpu, "BLOCK", 32)
        monkeypatch.setattr(gpu, "STEPS", 2)
        monkeypatch.setattr(gpu_low_rank, "DRAWN", 256)


def runs_of(live: torch.dtype, base: torch.dtype, rank: int) -> list[Run]:
    """Runs of all shapes, of two tensors, some of which share vectors."""
    places = [*((*stretch, None) for stretch in STRETCHES), *RECTANGLES]
    if rank > 1:  # one of each layout, as the interpreter is slow
        places = [places[0], places[3], RECTANGLES[0]]
    return [
        Run(weights(size, live), weights(size, base), 1, KEY + number % 2, start, rows, columns=columns, rank=rank)
        for number, (columns, start, size, rows) in enumerate(places)
    ]


def on_device(runs: list[Run], *, one: bool) -> list[Run]:
    """Copies there; with `one`, live weights that are their own base."""
    copies = [replace(run, live=run.live.to(DEVICE, copy=True), base=run.base.to(DEVICE, copy=True)) for run in runs]
    return [replace(run, base=run.live) if one else run for run in copies]


def as_arrays(run: Run) -> Run:
    return replace(run, live=array(run.live), base=array(run.base))


@pytest.mark.parametrize(
    ("base", "live", "rank", "most"),
    [(*TYPES[1], 1, gpu_low_rank.VECTORS), (*TYPES[4], 1, 40), (*TYPES[0], 4, 40)],
)
def test_perturb(base: torch.dtype, live: torch.dtype, rank: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_low_rank, "VECTORS", most)  # of the second, vectors of many launches
    expected = runs_of(live, base, rank)
    runs = on_device(expected, one=False)
    batch = gpu_low_rank.Batch(runs)
    for run in expected:
        passes.perturb(as_arrays(run), SEED, 0.01)
    batch.perturb(SEED, 0.01)
    assert all(torch.equal(a.live.cpu(), b.live) for a, b in zip(runs, expected, strict=True))
    batch.restore()
    assert all(torch.equal(a.live.cpu(), b.base.to(live)) for a, b in zip(runs, expected, strict=True))


@pytest.mark.parametrize(("dtype", "rank", "rounding_seed"), [(FLOAT, 4, None), (BRAIN, 1, 77), (HALF, 1, None)])
def test_update(dtype: torch.dtype, rank: int, rounding_seed: int | None) -> None:
    terms = Terms(np.array(SEEDS, np.uint64), np.array(COEFFICIENTS, np.float32), -0.01, rounding_seed)
    expected = on_device(runs_of(dtype, dtype, rank), one=True)
    runs = on_device(expected, one=True)
    for run in expected:
        passes.update(as_arrays(replace(run, live=run.live.cpu(), base=run.base.cpu())), terms)
    seeds = torch.from_numpy(terms.seeds.view(np.int64)).to(DEVICE)
    gpu_low_rank.Batch(runs).update(seeds, torch.from_numpy(terms.scaled(1.0)).to(DEVICE), -0.01, rounding_seed)
    assert all(torch.equal(a.base.cpu(), b.base.cpu()) for a, b in zip(runs, expected, strict=True))


def test_an_update_of_decay_alone() -> None:
    base = weights(40, FLOAT).to(DEVICE)
    expected = base + base * -0.5
    none = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.empty(0, device=DEVICE)
    gpu_low_rank.Batch([Run(base, base, 1, KEY, columns=8)]).update(*none, -0.5)
    assert torch.equal(base, expected)


def test_perturbed_weights_are_base_plus_the_outer_product_of_the_specification() -> None:
    base = weights(35, FLOAT)
    live = torch.empty_like(base).to(DEVICE)
    gpu_low_rank.Batch([Run(live, base.to(DEVICE), 1, KEY, columns=7)]).perturb(SEED, -0.25)
    a = reference.normal_by_id(SEED, KEY, 0, 5)
    b = reference.normal_by_id(SEED, KEY, 2**40, 7)
    expected: Any = base.numpy() + np.outer(a, b).ravel() * np.float32(-0.25)
    assert np.array_equal(live.cpu().numpy(), expected)


def test_vectors_that_runs_share_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw_one = gpu_low_rank.Vectors.draw_one
    monkeypatch.setattr(
        gpu_low_rank.Vectors, "draw_one", lambda vectors, seed: drawn.append(vectors.size) or draw_one(vectors, seed)
    )
    whole = torch.zeros(64, device=DEVICE)
    batch = gpu_low_rank.Batch([Run(part, part, 1, KEY, 8 * i, columns=8) for i, part in enumerate(whole.split(8))])
    batch.perturb(SEED, 0.5)
    assert drawn == [8 + 8 * 4]  # b, and one element of a for each, padded

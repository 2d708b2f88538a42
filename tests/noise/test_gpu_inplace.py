"""The kernels that perturb in place and take it back, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from estune.noise import cpu
from estune.noise.rows import Rows, Run
from estune.weights.split import split

pytest.importorskip("triton")
pytest.importorskip("tests.interpreted")
from estune.noise import gpu, gpu_inplace
from tests.noise.test_noise_gpu import DEVICE, KEY, ON_GPU, SEEDS, array

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZE = 300


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(gpu, "BLOCK", 32)
        monkeypatch.setattr(gpu, "STEPS", 2)


def special(dtype: torch.dtype) -> torch.Tensor:
    """Weights of a model, and all that a float can be."""
    drawn = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).mul(0.02).to(dtype)
    finite = torch.finfo(dtype)
    odd = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, finite.max, finite.min, finite.tiny, -finite.tiny / 4]
    drawn[torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))[: 2 * len(odd)]] = torch.tensor(
        odd * 2, dtype=dtype
    )
    return drawn


def runs_of(weights: torch.Tensor, lower: torch.Tensor | None = None) -> list[Run]:
    """Stretches that begin anywhere, and columns of whole counters and of parts; with the lower halves, if any."""
    places: list[Any] = [(3, None), (2**34 - 8, None), (16, Rows(4, 12, 4)), (5, Rows(37, 90, 3))]
    found = []
    for (a, b), (start, rows) in zip(((0, 140), (140, 151), (151, 231), (231, SIZE)), places, strict=True):
        live = weights[a:b].clone().to(DEVICE)
        base = live if lower is None else lower[a:b].clone().to(DEVICE)
        found.append(Run(live, base, 1, KEY, start, rows))
    return found


@pytest.mark.parametrize(("dtype", "expected"), [*((dtype, 1 / 2) for dtype in DTYPES), (torch.bfloat16, 1 / 100)])
def test_perturbed_weights_are_those_of_the_cpu_and_come_back(
    dtype: torch.dtype, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_inplace, "EXPECTED", expected)  # of the last, the room is too little
    before = runs_of(special(dtype))
    runs = runs_of(special(dtype))
    reversible = gpu_inplace.Reversible(gpu.Batch(runs))
    for seed, sigma in zip(SEEDS, (0.001, -2.0), strict=False):
        reversible.perturb(seed, sigma)
        for run, old in zip(runs, before, strict=True):
            found = torch.empty_like(old.live, device="cpu")
            cpu.perturb(array(found), array(old.live.cpu()), seed, KEY, run.start, sigma, run.rows)
            assert torch.equal(run.live.cpu().nan_to_num(7), found.nan_to_num(7))
        reversible.restore(seed, sigma)
        for run, old in zip(runs, before, strict=True):
            assert np.array_equal(run.live.cpu().view(torch.uint8), old.live.cpu().view(torch.uint8))


@pytest.mark.parametrize("expected", [1 / 2, 1 / 100])
def test_halves_of_float32_weights_come_back(expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_inplace, "EXPECTED", expected)
    weights = special(torch.float32).nan_to_num(0.02)
    weights[::5] = weights[::5].half().float()  # ties among them
    upper, lower = (torch.empty(SIZE, dtype=torch.int16) for _ in range(2))
    upper[split(weights, upper, lower)] -= 1
    runs, before, whole = (runs_of(*pair) for pair in ((upper.view(torch.bfloat16), lower),) * 2 + ((weights,),))
    reversible = gpu_inplace.Reversible(gpu.Batch(runs))
    for seed, sigma in zip(SEEDS, (0.001, -2.0), strict=False):
        reversible.perturb(seed, sigma)
        for run, old in zip(runs, whole, strict=True):
            found = torch.empty(len(old.live), dtype=torch.bfloat16)
            cpu.perturb(array(found), array(old.live.cpu()), seed, KEY, run.start, sigma, run.rows)
            assert torch.equal(run.live.cpu().view(torch.int16), found.view(torch.int16))
        reversible.restore(seed, sigma)
        for run, old in zip(runs, before, strict=True):
            assert torch.equal(run.live.cpu().view(torch.int16), old.live.cpu().view(torch.int16))
            assert torch.equal(run.base.cpu(), old.base.cpu())

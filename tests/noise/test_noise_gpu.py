"""The Triton kernels against the CPU's, bit for bit, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from estune.noise import cpu, cpu_sums, reference
from estune.noise.rows import Rows, Run

pytest.importorskip("triton")
pytest.importorskip("tests.interpreted")
import triton
import triton.language as tl

from estune.noise import gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KEY = reference.tensor_id("model.layers.0.self_attn.q_proj.weight")
SEEDS = [5, 2**63 + 12345, 2**64 - 1]
RUNS = [(0, 100), (3, 25000 if ON_GPU else 250), (2**34 - 8, 50), (2**34 - 8, 24), (8, 3), (1, 1), (0, 0)]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
SEEDED = [*((SEEDS[0], *run) for run in RUNS), *((seed, *RUNS[3]) for seed in SEEDS[1:])]
TYPES = [(FLOAT, FLOAT), (FLOAT, BRAIN), (BRAIN, BRAIN), (FLOAT, HALF), (HALF, HALF)]  # of bases and live weights


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few elements, as the interpreter is slow."""
    if not ON_GPU:
        monkeypatch.setattr(gpu, "BLOCK", 32)
        monkeypatch.setattr(gpu, "STEPS", 2)


def weights(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(0.05).to(dtype)


def array(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize(("seed", "start", "size"), SEEDED)
def test_perturb(seed: int, start: int, size: int) -> None:
    for base_type, live_type in TYPES:
        base, expected = weights(size, base_type), torch.empty(size, dtype=live_type)
        cpu.perturb(array(expected), array(base), seed, KEY, start, 0.01)
        live = torch.empty(size, dtype=live_type, device=DEVICE)
        gpu.Batch([Run(live, base.to(DEVICE), 0, KEY, start)]).perturb(seed, 0.01)
        assert torch.equal(live.cpu(), expected)


@pytest.mark.parametrize(
    ("start", "size", "rounding_seed"),
    [*((*run, 77) for run in RUNS), *((*run, seed) for seed in (None, 2**64 - 3) for run in RUNS[2:4])],
)
def test_update(start: int, size: int, rounding_seed: int | None) -> None:
    seeds, coefficients = np.array([*SEEDS, 3], np.uint64), np.array([0.1, -0.2, 0.3, 1e-4], np.float32)
    on_device = torch.from_numpy(seeds.view(np.int64)).to(DEVICE), torch.from_numpy(coefficients).to(DEVICE)
    for dtype in (FLOAT, BRAIN, HALF):
        expected = weights(size, dtype)
        base = expected.clone().to(DEVICE)
        cpu.update(array(expected), seeds, coefficients, KEY, start, -0.01, rounding_seed)
        gpu.Batch([Run(base, base, 0, KEY, start)]).update(*on_device, -0.01, rounding_seed)
        assert torch.equal(base.cpu(), expected)


@pytest.mark.parametrize(("start", "size"), RUNS)
def test_fingerprint(start: int, size: int) -> None:
    for dtype in (FLOAT, BRAIN, HALF):
        base = weights(size, dtype)
        total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        on_device = base.to(DEVICE)
        gpu.Batch([Run(on_device, on_device, KEY, 0, start)]).fingerprint(total)
        assert int(total) % 2**64 == cpu_sums.fingerprint(array(base), KEY, start)


def test_runs_of_all_kinds_in_one_batch() -> None:
    """Of one pass they take as many launches as there are kinds, however many there are."""
    runs = []
    for number, ((base, live), (start, size)) in enumerate(
        itertools.product(TYPES, [(0, 40), (4, 8), (3, 9), (8, 70)])
    ):
        runs.append(Run(weights(size, live), weights(size, base), number, KEY + number, start, counted=number % 3 > 0))
        runs.append(replace(runs[-1], rows=Rows(4, 12, 4 * (number % 2)), start=16, live=weights(size, live)))
    expected = [replace(run, live=run.live.clone()) for run in runs]
    on_device = [replace(run, live=run.live.to(DEVICE), base=run.base.to(DEVICE)) for run in runs]
    batch = gpu.Batch(on_device)
    total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for sigma in (0.01, 0.0):
        for run in expected:
            cpu.perturb(array(run.live), array(run.base), 5, run.noise, run.start, sigma, run.rows)
        if sigma:
            batch.perturb(5, sigma)
        else:
            batch.restore()
        assert all(torch.equal(a.live.cpu(), b.live) for a, b in zip(on_device, expected, strict=True))
    batch.fingerprint(total)
    counted = (cpu_sums.fingerprint(array(r.base), r.key, r.start, r.rows) for r in runs if r.counted)
    assert int(total) % 2**64 == sum(counted) % 2**64


def test_launches_grow_with_kinds_and_not_with_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(gpu.Launch, "start", lambda launch, kernel, *rest, **types: launched.append(kernel.fn.__name__))
    tensors = [torch.ones(1 + number % 5, dtype=BRAIN, device=DEVICE) for number in range(290)]
    batch = gpu.Batch([Run(tensor, tensor, number, number) for number, tensor in enumerate(tensors)])
    batch.perturb(5, 0.01)
    assert launched == ["_perturb"] * 2  # of whole counters, and others


@pytest.mark.parametrize("size", [0, 3, 1030, cpu_sums.SQUARES_BLOCK + 1])
def test_squares(size: int) -> None:
    for base_type, stored_type in TYPES:
        base, then = weights(size, base_type), weights(size + 1, stored_type)[1:]
        sums = gpu.squares(base.to(DEVICE), then.to(DEVICE))
        assert np.array_equal(sums.cpu().numpy(), cpu_sums.squares(array(base), array(then)))


def test_zero_keeps_its_sign_and_the_ends_of_the_range_their_bits() -> None:
    """Words whose sine is 0, in each quadrant, and those of the smallest and the largest radius."""
    a = np.array([0, 255, 256, 2**31, 2**32 - 1], np.uint32)
    b = np.array([(quadrant << 30) | (t << 6) for quadrant in range(4) for t in (0, 2**23, 2**24 - 1)], np.uint32)
    words = [w.reshape(-1)[:32] for w in np.meshgrid(a, b)]
    on_device = [torch.from_numpy(w.astype(np.int64)).to(DEVICE) for w in words]
    normals = torch.empty(2, 32, device=DEVICE)
    _transform[(1,)](*on_device, normals[0], normals[1], COUNT=32, enable_fp_fusion=False)
    expected = reference.box_muller(*words)
    for found, exact in zip(normals.cpu().numpy(), expected, strict=True):
        assert np.array_equal(found.view(np.uint32), exact.view(np.uint32))
    assert any(np.signbit(e[e == 0]).any() and not np.signbit(e[e == 0]).all() for e in expected)


@triton.jit
def _transform(a, b, n0, n1, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    found = gpu.box_muller(tl.load(a + at).to(tl.uint32), tl.load(b + at).to(tl.uint32))
    tl.store(n0 + at, found[0])
    tl.store(n1 + at, found[1])


def test_kernels_compile_for_cuda_and_round_every_operation() -> None:
    """Without a device, by the compilers that Triton brings: no fused multiply-add, nothing flushed to zero."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_gpu"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [7 * ["_perturb"], 3 * ["_restore"], 6 * ["_update"], 4 * ["_fingerprint"], 2 * ["_squares"]]
    in_place = [*5 * ["_perturb"], *4 * ["_subtract"], *3 * ["_patch"]]  # of the last device alone
    low_rank = ["_draw", *3 * ["_perturb"], *4 * ["_update"]]
    found = [line.split() for line in done.stdout.splitlines()]
    older = [kind[0] for kind in expected]
    assert [name for name, _ in found] == [*older, *itertools.chain(*expected), *in_place, *low_rank]
    # Instructions for a normal, by types: memory, rounding and a root's far branches included.
    counts = [float(count) for name, count in found if count != "-"]
    assert len(counts) == 5 + 4
    assert max(counts) < 70

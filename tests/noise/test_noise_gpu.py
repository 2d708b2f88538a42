"""The Triton kernels against the CPU's, bit for bit, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from estune.noise import cpu, reference

pytest.importorskip("triton")
import triton
import triton.language as tl

from estune.noise import gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KEY = reference.tensor_id("model.layers.0.self_attn.q_proj.weight")
SEEDS = [5, 2**63 + 12345, 2**64 - 1]
RUNS = [(0, 100), (3, 2500 if ON_GPU else 250), (2**34 - 7, 50), (1, 1), (0, 0)]
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
TYPES = [(FLOAT, FLOAT), (FLOAT, BRAIN), (BRAIN, BRAIN), (FLOAT, HALF), (HALF, HALF)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few elements, as the interpreter is slow."""
    if not ON_GPU:
        monkeypatch.setattr(gpu, "BLOCK", 16)
        monkeypatch.setattr(gpu, "FINGERPRINT_BLOCK", 64)


def weights(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(0.05).to(dtype)


def array(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize(("start", "size"), RUNS)
@pytest.mark.parametrize("seed", SEEDS)
def test_perturb(seed: int, start: int, size: int) -> None:
    for base_type, live_type in TYPES:
        base, expected = weights(size, base_type), torch.empty(size, dtype=live_type)
        cpu.perturb(array(expected), array(base), seed, KEY, start, 0.01)
        live = torch.empty(size, dtype=live_type, device=DEVICE)
        gpu.perturb(live, base.to(DEVICE), seed, KEY, start, 0.01)
        assert torch.equal(live.cpu(), expected)


@pytest.mark.parametrize(("start", "size"), RUNS)
@pytest.mark.parametrize("rounding_seed", [None, 77, 2**64 - 3])
def test_update(start: int, size: int, rounding_seed: int | None) -> None:
    seeds, coefficients = np.array([*SEEDS, 3], np.uint64), np.array([0.1, -0.2, 0.3, 1e-4], np.float32)
    on_device = torch.from_numpy(seeds.view(np.int64)).to(DEVICE), torch.from_numpy(coefficients).to(DEVICE)
    for dtype in (FLOAT, BRAIN, HALF):
        expected = weights(size, dtype)
        base = expected.clone().to(DEVICE)
        cpu.update(array(expected), seeds, coefficients, KEY, start, -0.01, rounding_seed)
        gpu.update(base, *on_device, KEY, start, -0.01, rounding_seed)
        assert torch.equal(base.cpu(), expected)


@pytest.mark.parametrize(("start", "size"), RUNS)
def test_fingerprint(start: int, size: int) -> None:
    for dtype in (FLOAT, BRAIN, HALF):
        base = weights(size, dtype)
        total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        gpu.fingerprint(base.to(DEVICE), KEY, start, total)
        assert int(total) % 2**64 == cpu.fingerprint(array(base), KEY, start)


@pytest.mark.parametrize("size", [0, 3, 1030, cpu.SQUARES_BLOCK + 1])
def test_squares(size: int) -> None:
    for base_type, stored_type in [*TYPES, (FLOAT, BRAIN)]:
        base, then = weights(size, base_type), weights(size + 1, stored_type)[1:]
        sums = gpu.squares(base.to(DEVICE), then.to(DEVICE))
        assert np.array_equal(sums.cpu().numpy(), cpu.squares(array(base), array(then)))


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
    assert done.stdout.split() == 2 * (10 * ["_perturb"] + 8 * ["_update"] + 4 * ["_fingerprint"])

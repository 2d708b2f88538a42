"""The Triton kernels against the CPU's, bit for bit, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from estune.noise import cpu, reference

pytest.importorskip("triton")
from estune.noise import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = reference.tensor_id("model.layers.0.self_attn.q_proj.weight")
SEEDS = [5, 2**63 + 12345, 2**64 - 1]
RUNS = [(0, 100), (3, 2500), (2**34 - 7, 50), (1, 1), (0, 0)]
TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


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
    for dtype in (torch.float32, torch.bfloat16):
        expected = weights(size, dtype)
        base = expected.clone().to(DEVICE)
        cpu.update(array(expected), seeds, coefficients, KEY, start, -0.01, rounding_seed)
        gpu.update(base, *on_device, KEY, start, -0.01, rounding_seed)
        assert torch.equal(base.cpu(), expected)


@pytest.mark.parametrize(("start", "size"), RUNS)
def test_fingerprint(start: int, size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = weights(size, dtype)
        total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        gpu.fingerprint(base.to(DEVICE), KEY, start, total)
        assert int(total) % 2**64 == cpu.fingerprint(array(base), KEY, start)

"""Factors of tensors' noise, and moments of updates, against NumPy; on the CPU and by a device's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from estune.errors import EstuneError
from estune.es.strategy import Member, Moments, Update
from estune.noise import reference
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter
from estune.weights.scales import scales_of
from estune.weights.weights import Weights
from tests.models import save_model

SHAPES = {"a": (7, 9), "b": (5,)}
SCALES = {"a": 0.30000001192092896}
MEMBERS = (Member(5), Member(6), Member(7))
UPDATE = Update(0, MEMBERS, (0.25, -0.5, 0.125), decay=-0.25)


def weights(dtype: torch.dtype = torch.float32, **options: Any) -> Weights:
    generator = torch.Generator().manual_seed(1)
    parameters = [Parameter(n, torch.randn(shape, generator=generator).to(dtype)) for n, shape in SHAPES.items()]
    return Weights(parameters, scales=SCALES, **options)


def noise(seed: int, name: str) -> np.ndarray[Any, Any]:
    return reference.normal_by_id(seed, reference.tensor_id(name), 0, int(np.prod(SHAPES[name])))


def test_members_and_updates_are_scaled() -> None:
    found = weights()
    before = {name: base.copy() for name, base in found.base.items()}
    found.perturb(Member(3, -1), 0.1)
    for p in found.parameters:
        expected = before[p.name] + np.float32(-0.1 * SCALES.get(p.name, 1.0)) * noise(3, p.name)
        np.testing.assert_array_equal(p.tensor.numpy().ravel(), expected)
    found.apply(UPDATE)
    for name, base in found.base.items():
        change = sum(
            c * SCALES.get(name, 1.0) * noise(m.seed, name) for m, c in zip(MEMBERS, UPDATE.coefficients, strict=True)
        )
        np.testing.assert_allclose(base, 0.75 * before[name] + change, atol=1e-6)


def test_what_is_kept_in_place_gives_scaled_members_back_to_the_bit() -> None:
    found = weights(torch.bfloat16, policy="exact_inplace")
    before = found.fingerprint()
    for seed in range(20):
        found.perturb(Member(seed), 0.05)
    found.restore()
    assert found.fingerprint() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_moments_are_adams(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.weights.moments.STRETCH", 16)
    found = weights(threads=threads)
    theta = {name: base.astype(float) for name, base in found.base.items()}
    first = {name: np.zeros(base.size) for name, base in theta.items()}
    second = {name: np.zeros(base.size) for name, base in theta.items()}
    for t in (1, 2, 3):
        moments = Moments(0.01 / (1 - 0.5**t), 0.5, 0.75, 1 / (1 - 0.75**t), 1e-8)
        found.apply(Update(t, MEMBERS, (0.1 * t, -0.2, 0.3), -0.125, moments=moments))
        for name, base in theta.items():
            g = SCALES.get(name, 1.0) * (0.1 * t * noise(5, name) - 0.2 * noise(6, name) + 0.3 * noise(7, name))
            first[name] = 0.5 * first[name] + 0.5 * g
            second[name] = 0.75 * second[name] + 0.25 * g**2
            base += -0.125 * base + 0.01 * first[name] / (1 - 0.5**t) / np.sqrt(second[name] / (1 - 0.75**t))
    for name, base in found.base.items():
        np.testing.assert_allclose(base, theta[name], atol=2e-6)


def test_factors_by_pattern_and_by_root_mean_square(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "model"))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    names = list(checkpoint.tensors)
    mlp = [name for name in names if ".mlp." in name]
    assert scales_of({"*.mlp.*": 0.5, "*": 1.0}, checkpoint, names) == dict.fromkeys(mlp, 0.5)
    found = scales_of({"*.mlp.*": 0.5, "*": "rms"}, checkpoint, names)
    whole = np.sqrt(np.mean(np.concatenate([t.ravel().astype(float) for t in stored.values()]) ** 2))
    for name, tensor in stored.items():
        expected = 0.5 if name in mlp else np.sqrt(np.mean(tensor.astype(float) ** 2)) / whole
        assert found[name] == pytest.approx(expected, rel=1e-6)
        assert found[name] == np.float32(found[name])
    with pytest.raises(EstuneError, match=r"no trained parameter's name fits the pattern '\*\.mpl\.\*'"):
        scales_of({"*.mpl.*": 0.5}, checkpoint, names)


def test_zeros_have_no_size_to_go_by(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] *= 0
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EstuneError, match="are all zero"):
        scales_of({"*": "rms"}, Checkpoint(folder), list(tensors))


def test_guided_members_are_the_sum_that_they_name() -> None:
    found = weights()
    before = {name: base.copy() for name, base in found.base.items()}
    found.perturb(Member(3, -1, own=0.75, along=((4, 0.5), (5, -0.25))), 0.1)
    for p in found.parameters:
        scale = SCALES.get(p.name, 1.0)
        change = 0.75 * noise(3, p.name) + 0.5 * noise(4, p.name) - 0.25 * noise(5, p.name)
        np.testing.assert_allclose(p.tensor.numpy().ravel(), before[p.name] - 0.1 * scale * change, atol=1e-6)
    found.restore()
    assert all(np.array_equal(p.tensor.numpy().ravel(), before[p.name]) for p in found.parameters)

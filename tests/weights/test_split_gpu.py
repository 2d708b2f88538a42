"""The halves of a float32 base on a device against a whole base on the CPU, bit for bit: see `test_weights_gpu.py`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from estune.es.strategy import Member
from estune.weights.checkpoint import Checkpoint
from estune.weights.device_storage import SplitStorage
from estune.weights.parameters import Parameter
from estune.weights.weights import Weights

pytest.importorskip("triton")
pytest.importorskip("tests.interpreted")
from estune.noise import gpu
from tests.weights.test_weights_gpu import DEVICE, ON_GPU, SHAPES, base_bits, bits, operations


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.weights.device_storage.STREAMED_LENGTH", 41)
    if not ON_GPU:
        monkeypatch.setattr("estune.weights.weights.open_storage", lambda runs, threads: SplitStorage(runs))
        monkeypatch.setattr(gpu, "BLOCK", 32)
        monkeypatch.setattr(gpu, "STEPS", 2)


def parameters() -> list[Parameter]:
    """In float32, of which float16 has the numbers too: every 16th is a tie."""
    generator = torch.Generator().manual_seed(1)
    return [
        Parameter(name, torch.randn(shape, generator=generator).mul(0.1).half().float())
        for name, shape in SHAPES.items()
    ]


def opened(policy: Any, device: str, **options: Any) -> Weights:
    """Weights with these numbers as their base."""
    wholes = parameters()
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu" and policy == "master":
            from estune.weights.storage import open_storage

            patch.setattr("estune.weights.weights.open_storage", open_storage)
        weights = Weights([replace(p, tensor=p.tensor.bfloat16().to(device)) for p in wholes], policy=policy, **options)
    with tempfile.TemporaryDirectory() as folder:
        save_file({p.name: p.tensor for p in wholes}, Path(folder) / "model.safetensors")
        weights.load(Checkpoint(Path(folder)))
    weights.restore()
    return weights


@given(operations, st.sampled_from(["iid", "correlated"]), st.sampled_from([{}, {"b": 0.5}]))
@settings(max_examples=4)
def test_any_history_gives_the_bits_of_master_on_the_cpu(history: Any, noise: Any, scales: Any) -> None:
    here = opened("master", "cpu", noise=noise, scales=scales)
    there = opened("split_master", DEVICE, noise=noise, scales=scales)
    assert type(there.storage) is SplitStorage
    addresses = [p.tensor.data_ptr() for p in there.parameters]
    for operation in history:
        for weights in (here, there):
            if operation is None:
                weights.restore()
            elif isinstance(operation, Member):
                weights.perturb(operation, 0.01)
            else:
                weights.apply(operation)
                weights.restore()
        assert bits(there) == bits(here)
    assert there.fingerprint() == here.fingerprint()
    assert base_bits(there) == base_bits(here)
    assert [p.tensor.data_ptr() for p in there.parameters] == addresses

"""Weights on a device, and with their base in host memory, against those on the CPU, bit for bit.

On a machine without a GPU the same code runs on CPU tensors, in Triton's interpreter and with streams that do nothing.
The interpreter takes ten microseconds an element, so that tensors and blocks are tiny there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from estune.errors import EstuneError
from estune.es.strategy import Member, Moments, Update
from estune.noise import reference
from estune.weights.base import keeps_base_on_host, make_base
from estune.weights.checkpoint import Checkpoint
from estune.weights.device_storage import BUFFERS, STREAMED_LENGTH, DeviceStorage, StreamedStorage
from estune.weights.parameters import Parameter, trained_parameters
from estune.weights.tensors import Tensor as StoredTensor
from estune.weights.weights import Weights
from tests.models import build_model, save_model

pytest.importorskip("triton")
pytest.importorskip("tests.interpreted")
from estune.noise import gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KINDS: dict[str, Any] = {"device": DeviceStorage, "streamed": StreamedStorage}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POLICIES = ["master", "copy", "inplace", "exact_inplace"]
NO_BASE = ["inplace", "exact_inplace"]
SHAPES = {"a.weight": (5, 15), "a.bias": (3,), "b": (1,)}


@contextmanager
def kind_of_storage(kind: str, length: int = 64) -> Iterator[None]:
    """Within this, weights on `DEVICE` are stored in this manner, and streamed `length` elements at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("estune.weights.device_storage.STREAMED_LENGTH", length)
        if not ON_GPU:
            patch.setattr("estune.weights.weights.open_storage", lambda runs, threads: KINDS[kind](runs))
            patch.setattr(gpu, "BLOCK", 32)
            patch.setattr(gpu, "STEPS", 2)
        yield


def on_device(parameters: Sequence[Parameter], kind: str, **options: Any) -> Weights:
    """Weights with copies of these tensors."""
    copies = [replace(p, tensor=p.tensor.to(DEVICE, copy=True)) for p in parameters]
    weights = Weights(copies, base_on_host=ON_GPU and kind == "streamed", **options)
    assert type(weights.storage) is (
        KINDS[kind] if options.get("policy") not in NO_BASE or not ON_GPU else KINDS["device"]
    )
    return weights


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        Parameter(name, torch.randn(shape, generator=generator).mul(0.1).to(dtype)) for name, shape in SHAPES.items()
    ]


def bits(weights: Weights) -> list[bytes]:
    return [p.tensor.cpu().view(torch.uint8).numpy().tobytes() for p in weights.parameters]


def base_bits(weights: Weights) -> list[bytes]:
    return [array.tobytes() for array in weights.base.values()]


seeds = st.one_of(st.integers(0, 9), st.integers(2**63, 2**64 - 1))
members = st.builds(Member, seeds, st.sampled_from([1, -1]))
coefficients = st.sampled_from([0.0, 0.25, -1e-4, 3e-7])
updates = st.builds(
    lambda pairs, decay, seed: Update(0, tuple(m for m, _ in pairs), tuple(c for _, c in pairs), decay, seed),
    st.lists(st.tuples(members, coefficients), max_size=3),
    st.sampled_from([0.0, -0.01]),
    seeds,
)
operations = st.lists(st.one_of(members, updates, st.none()), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@given(
    operations,
    st.sampled_from(DTYPES),
    st.sampled_from(POLICIES),
    st.sampled_from(["nearest", "stochastic"]),
    st.sampled_from(["iid", "correlated", "rank1", "rank2"]),
    st.sampled_from([30, 41, 1000]),
)
@settings(max_examples=8)
def test_any_history_gives_the_bits_of_the_cpu(
    kind: str, history: Any, dtype: torch.dtype, policy: Any, rounding: Any, noise: Any, length: int
) -> None:
    assume(policy != "exact_inplace" or not noise.startswith("rank"))
    options = {"policy": policy, "rounding": rounding, "noise": noise}
    cpu = Weights(parameters(dtype), **options)
    with kind_of_storage(kind, length):
        device = on_device(parameters(dtype), kind, **options)
        addresses = [p.tensor.data_ptr() for p in device.parameters]
        for operation in history:
            for weights in (cpu, device):
                if operation is None:
                    weights.restore()
                elif isinstance(operation, Member):
                    weights.perturb(operation, 0.01)
                else:
                    weights.apply(operation)
            assert bits(device) == bits(cpu)
        assert device.fingerprint() == cpu.fingerprint()
        assert base_bits(device) == base_bits(cpu)
        assert device.rule == cpu.rule
        assert [p.tensor.data_ptr() for p in device.parameters] == addresses


def test_an_outer_product_is_not_taken_back_from_patches() -> None:
    with kind_of_storage("device"):
        weights = on_device(parameters(), "device", policy="exact_inplace", noise="rank1")
        with pytest.raises(EstuneError, match="exact_inplace can take noise of low rank on a GPU where members"):
            weights.perturb(Member(1), 0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturbed_weights_are_base_plus_noise_rounded_once(kind: str, dtype: torch.dtype) -> None:
    with kind_of_storage(kind):
        weights = on_device(parameters(dtype), kind)
        weights.perturb(Member(2**64 - 5, -1), 0.02)
    for before, after in zip(parameters(dtype), weights.parameters, strict=True):
        key, size = reference.tensor_id(before.name), before.tensor.numel()
        noise = torch.from_numpy(reference.normal_by_id(2**64 - 5, key, 0, size)).view(before.tensor.shape)
        expected = (before.tensor.float() + noise * torch.tensor(-0.02)).to(dtype)
        assert torch.equal(after.tensor.cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_saved_and_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.weights.weights.RUN_LENGTH", 50)
    base = Checkpoint(save_model(tmp_path / "model", "llama"))
    update = Update(0, (Member(4),), (0.25,))
    with kind_of_storage(kind, 1000):
        monkeypatch.setattr(gpu, "BLOCK", 32)  # some thousand elements
        found = trained_parameters(build_model("llama"), base.tensors, "*.layers.0.self_attn.*")
        weights = on_device(found, kind)
        weights.load(base)
        weights.apply(update)
        base.write(tmp_path / "saved", weights.runs(), "float32")
        again = on_device(found, kind)
        again.load(Checkpoint(tmp_path / "saved"))
    cpu = Weights(found)
    cpu.load(base)
    cpu.apply(update)
    assert weights.fingerprint() == again.fingerprint() == cpu.fingerprint()
    saved = Checkpoint(tmp_path / "saved").tensors
    assert all(np.array_equal(saved[name].read(), array) for name, array in cpu.base.items())


def test_drift_is_that_of_the_cpu() -> None:
    cpu = Weights(parameters(torch.bfloat16), policy="inplace")
    with kind_of_storage("device"):
        device = on_device(parameters(torch.bfloat16), "device", policy="inplace")
        for weights in (cpu, device):
            weights.perturb(Member(1), 0.05)
            weights.perturb(Member(2), 0.05)
        assert device.drift() == cpu.drift()
        assert cpu.drift().changed > 0


def test_an_update_sends_its_members_once_and_not_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(gpu.Batch, "update", lambda batch, seeds, *rest: sent.append(seeds.data_ptr()))
    with kind_of_storage("streamed", 20):
        on_device(parameters(), "streamed").apply(Update(0, (Member(3), Member(4)), (0.5, 0.0)))
    assert len(sent) == 5  # 20 elements at a time, of 75, 3 and 1: the rest of the first goes with the second
    assert len(set(sent)) == 1


class _Stream:
    """Writes down what it waits for."""

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: _Stream) -> None:
        self.log.append((self.name, "waits for", other.name))


class _Streams:
    """In place of `torch.cuda`, as far as streaming goes."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.count = 0
        self.current = _Stream("current", self.log)

    def Stream(self) -> _Stream:
        self.count += 1
        return _Stream(f"stream {self.count}", self.log)

    def current_stream(self) -> _Stream:
        return self.current

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        self.log.append((stream.name, "works"))
        yield

    def synchronize(self) -> None:
        self.log.append(("host", "waits"))


@pytest.mark.skipif(ON_GPU, reason="stands in for the GPU's streams")
def test_streams_take_turns_and_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = _Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    with kind_of_storage("streamed", 20):
        on_device([Parameter("a", torch.zeros(50))], "streamed").perturb(Member(1), 0.5)
    both = ["stream 1", "stream 2"]
    assert streams.log == [
        *((name, "waits for", "current") for name in both),
        *((name, "works") for name in (*both, both[0])),
        *(("current", "waits for", name) for name in both),
        ("host", "waits"),
    ]


class _StreamsOfThreads:
    """In place of `torch.cuda`: every thread has a current stream, and begins on the default one."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def current_stream(self) -> str:
        return str(getattr(self._of_thread, "stream", "default"))

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before = self.current_stream()
        self._of_thread.stream = stream
        yield
        self._of_thread.stream = before


def test_threads_that_read_a_checkpoint_are_on_the_stream_of_their_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they would write to weights that what was asked for before still perturbs."""
    base = Checkpoint(save_model(tmp_path / "model", "llama"))
    streams = _StreamsOfThreads()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    used: list[str] = []
    read = StoredTensor.stored
    monkeypatch.setattr(
        StoredTensor,
        "stored",
        lambda *a: used.append(streams.current_stream()) or read(*a),  # type: ignore[func-returns-value]
    )
    weights = Weights(trained_parameters(build_model("llama"), base.tensors), threads=2)
    with streams.stream("the engine's"):
        weights.load(base)
        weights.show(base)
        weights.change(base)
    assert set(used) == {"the engine's"}


def test_the_base_passes_through_two_small_buffers() -> None:
    assert STREAMED_LENGTH * torch.float32.itemsize * BUFFERS <= 64 << 20
    seen: list[list[tuple[int, int, int]]] = []
    with kind_of_storage("streamed", 20):
        storage: Any = on_device([Parameter("a", torch.zeros(50)), Parameter("b", torch.zeros(3))], "streamed").storage
        storage.each(lambda batch: seen.append([(r.base.data_ptr(), r.start, len(r.base)) for r in batch.runs]))
        first, second = (buffer.data_ptr() for _, buffer in storage.buffers)
        buffers = [buffer for _, buffer in storage.buffers]
    # The last two go together: ten elements take 48 bytes, as each run begins at a multiple of 16.
    assert seen == [[(first, 0, 20)], [(second, 20, 20)], [(first, 40, 10), (first + 48, 0, 3)]]
    assert [b.nbytes for b in buffers] == [80, 80]


@pytest.mark.skipif(not ON_GPU, reason="pinned memory needs CUDA")
def test_a_base_in_host_memory_is_pinned_and_takes_no_more_than_its_size() -> None:
    live = [torch.arange(70000, device=DEVICE, dtype=torch.float16), torch.ones(3, device=DEVICE)]
    base = make_base(live, torch.float32, on_host=True)
    assert all(b.is_pinned() and torch.equal(b, a.cpu().float()) for a, b in zip(live, base, strict=True))
    assert base[0].untyped_storage().nbytes() < 1.01 * 4 * 70003
    del base
    make_base(live, torch.float32, on_host=True)  # released memory can be pinned again


@pytest.mark.skipif(ON_GPU, reason="stands in for CUDA's runtime")
def test_host_memory_is_pinned_as_a_whole_and_released_with_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append((address, size)),
        cudaHostUnregister=calls.append,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    live = [torch.arange(70.0), torch.ones(3, dtype=torch.bfloat16), torch.rand(200)]
    base = make_base(live, None, on_host=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(live, base, strict=True))
    ((address, size),) = calls
    assert [b.data_ptr() - address for b in base] == [0, 512, 768]  # in steps of 256 bytes
    assert size == 768 + 1024
    del base
    assert calls[1:] == [address]


def test_where_the_base_goes_is_a_matter_of_sizes() -> None:
    gib = 2**30
    sizes = {"base": 30 * gib, "live": 15 * gib}
    assert not keeps_base_on_host("auto", **sizes, memory=80 * gib)
    assert keeps_base_on_host("auto", **sizes, memory=74 * gib)
    assert keeps_base_on_host("host", **sizes, memory=80 * gib)
    assert not keeps_base_on_host("device", **sizes, memory=40 * gib)


def test_types_mixed_are_refused_where_the_base_has_the_live_type() -> None:
    mixed = [*parameters(torch.bfloat16), Parameter("norm", torch.zeros(3))]
    for policy in ("copy", *NO_BASE):
        with pytest.raises(EstuneError, match=f"weights={policy} .* bfloat16 and float32; set weights=master"):
            Weights(mixed, policy=policy)  # type: ignore[arg-type]
    Weights(mixed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["master", "exact_inplace"])
def test_scales_give_the_bits_of_the_cpu(kind: str, policy: str) -> None:
    """Tensors of other scales go to other launches."""
    options: dict[str, Any] = {"policy": policy, "scales": {"a.weight": 0.5, "b": 0.30000001192092896}}
    dtype = torch.float32 if policy == "master" else torch.bfloat16
    here = Weights(parameters(dtype), **options)
    with kind_of_storage(kind):
        there = on_device(parameters(dtype), kind, **options)
        for weights in (here, there):
            weights.perturb(Member(3, -1), 0.01)
        assert bits(here) == bits(there)
        for weights in (here, there):
            weights.apply(Update(0, (Member(1), Member(2)), (0.1, -0.2)))
            weights.restore()
        assert bits(here) == bits(there)
        assert here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_moments_give_the_bits_of_the_cpu(kind: str) -> None:
    here = Weights(parameters())
    with kind_of_storage(kind):
        there = on_device(parameters(), kind)
        for step in range(3):
            moments = Moments(0.01, 0.9, 0.99, 1 / (1 - 0.99 ** (step + 1)), 1e-8)
            for weights in (here, there):
                weights.apply(Update(step, (Member(step), Member(9)), (0.1, -0.2), -0.01, moments=moments))
        assert here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["master", "copy"])
def test_guided_members_have_the_bits_of_the_cpu(kind: str, policy: str) -> None:
    member = Member(3, -1, own=0.75, along=((4, 0.5), (5, -0.25)))
    options: dict[str, Any] = {"policy": policy, "scales": {"b": 0.5}}
    here = Weights(parameters(torch.bfloat16), **options)
    with kind_of_storage(kind):
        there = on_device(parameters(torch.bfloat16), kind, **options)
        before = bits(there)
        for weights in (here, there):
            weights.perturb(member, 0.1)
        assert bits(here) == bits(there) != before
        there.restore()
        assert bits(there) == before

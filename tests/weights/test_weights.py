"""Weights: exact restore over any history, exact updates, ties, and drift where a policy drifts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from estune.errors import EstuneError
from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Member, Update
from estune.noise import reference
from estune.weights.base import make_base
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter, fits, trained_parameters
from estune.weights.storage import CpuStorage, HostStorage, Run, open_storage
from estune.weights.weights import Weights
from tests.models import build_model, save_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEEP_BASE = ["master", "copy"]
EXACT = [*KEEP_BASE, "exact_inplace"]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (33, 17), "a.bias": (33,), "b.weight": (70, 64)}
    return [
        Parameter(name, torch.randn(shape, generator=generator).mul(0.1).to(dtype)) for name, shape in shapes.items()
    ]


def noise(seed: int, name: str, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reference.normal_by_id(seed, reference.tensor_id(name), 0, like.numel())).view(like.shape)


def bits(tensors: list[Parameter]) -> list[torch.Tensor]:
    return [p.tensor.view(torch.int32 if p.tensor.dtype == torch.float32 else torch.int16).clone() for p in tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", EXACT)
def test_ten_thousand_cycles_restore_every_bit(policy: Any, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    weights, original = Weights(ps, policy=policy), bits(ps)
    fingerprint = weights.fingerprint()
    addresses = [p.tensor.data_ptr() for p in ps]
    for seed in range(10_000):
        weights.perturb(Member(seed, 1 if seed % 3 else -1), 0.5)
        if seed % 100 == 0:
            assert not same(bits(ps), original)
        if seed % 2:
            weights.restore()
    weights.restore()
    assert same(bits(ps), original)
    assert weights.fingerprint() == fingerprint
    assert [p.tensor.data_ptr() for p in ps] == addresses


operations = st.lists(st.one_of(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([1, -1])), st.none()), max_size=12)


@given(operations, st.sampled_from(EXACT), st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_any_history_leaves_the_base_alone(history: Any, policy: Any, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    weights, original = Weights(ps, policy=policy), bits(ps)
    for operation in history:
        weights.restore() if operation is None else weights.perturb(Member(*operation), 0.01)
    weights.restore()
    assert same(bits(ps), original)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("policy", [*EXACT, "inplace"])
def test_perturbed_weights_are_base_plus_noise_rounded_once(policy: Any, sign: int, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    expected = [
        (p.tensor.float() + torch.tensor(sign * 0.02, dtype=torch.float32) * noise(9, p.name, p.tensor)).to(dtype)
        for p in ps
    ]
    Weights(ps, policy=policy).perturb(Member(9, sign), 0.02)
    assert all(torch.equal(p.tensor, e) for p, e in zip(ps, expected, strict=True))


@pytest.mark.parametrize("policy", [*EXACT, "inplace"])
def test_update_is_the_weighted_sum(policy: Any) -> None:
    ps = parameters()
    before = [p.tensor.double().clone() for p in ps]
    weights = Weights(ps, policy=policy)
    weights.perturb(Member(77), 0.01)  # whatever was evaluated last must not leak into the update
    weights.apply(Update(0, (Member(3), Member(4)), (0.25, -0.5), decay=-0.125))
    weights.restore()
    for p, old in zip(ps, before, strict=True):
        change = 0.25 * noise(3, p.name, p.tensor).double() - 0.5 * noise(4, p.name, p.tensor).double()
        torch.testing.assert_close(p.tensor.double(), old - 0.125 * old + change, rtol=0, atol=1e-6)


def test_small_updates_survive_in_master_and_are_lost_in_a_bfloat16_copy() -> None:
    update = Update(0, (Member(3),), (1e-6,))
    moved = {}
    for policy in ("master", "copy"):
        ps = parameters(torch.bfloat16)
        weights = Weights(ps, policy=policy)  # type: ignore[arg-type]
        before = {k: v.copy() for k, v in weights.base.items()}
        weights.apply(update)
        moved[policy] = np.mean(np.concatenate([weights.base[k] != v for k, v in before.items()]))
    assert moved["master"] > 0.99
    assert moved["copy"] < 0.05


def test_stochastic_rounding_moves_what_nearest_loses() -> None:
    ps = parameters(torch.bfloat16)
    weights = Weights(ps, policy="copy", rounding="stochastic")
    before = {k: v.copy() for k, v in weights.base.items()}
    weights.apply(Update(0, (Member(3),), (1e-4,), rounding_seed=11))
    moved = np.mean(np.concatenate([weights.base[k] != v for k, v in before.items()]))
    assert 0.05 < moved < 0.9


def test_threads_and_runs_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def final(threads: int) -> list[torch.Tensor]:
        ps = parameters()
        weights = Weights(ps, threads=threads)
        strategy = EvolutionStrategy(population=4, sigma=0.1)
        for member in strategy.ask():
            weights.perturb(member, 0.1)
        weights.apply(strategy.tell([1.0, 2.0, 0.5, 0.0]))
        weights.perturb(Member(1), 0.1)
        return bits(ps)

    one = final(1)
    monkeypatch.setattr("estune.weights.storage.RUN_LENGTH", 1000)
    assert same(one, final(1))
    assert same(one, final(3))


@given(
    operations,
    st.sampled_from(DTYPES),
    st.sampled_from(["nearest", "stochastic"]),
    st.sampled_from([1, 3]),
    st.sampled_from([1e-5, 0.01, 3.0]),
)
@settings(max_examples=30)
def test_exact_in_place_gives_the_bits_of_a_copy(
    history: Any, dtype: torch.dtype, rounding: Any, threads: int, sigma: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("estune.weights.storage.RUN_LENGTH", 1000)
        options: Any = {"rounding": rounding, "threads": threads}
        both = [Weights(parameters(dtype), policy=policy, **options) for policy in ("copy", "exact_inplace")]
    for step, operation in enumerate(history):
        for weights in both:
            if operation is None:
                weights.apply(Update(step, (Member(step), Member(9)), (1e-4, -2e-3), decay=-0.01, rounding_seed=step))
            else:
                weights.perturb(Member(*operation), sigma)
            if operation is None:
                weights.restore()
        assert same(*(bits(weights.parameters) for weights in both))
    copy, exact = both
    assert copy.fingerprint() == exact.fingerprint()
    assert exact.drift() is None


def test_what_exact_in_place_keeps_is_a_small_part_of_the_weights() -> None:
    tensor = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).mul(0.02)
    for dtype, most in ((torch.bfloat16, 0.055), (torch.float16, 0.055), (torch.float32, 0.045)):
        weights = Weights([Parameter("a", tensor.to(dtype))], policy="exact_inplace")
        bound = weights.rule.how.base_bytes(weights.elements, weights.rule.dtype)
        for seed in range(3):
            weights.perturb(Member(seed), 0.001)
        assert 0 < weights.storage.patch_bytes < most * tensor.to(dtype).nbytes < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", KEEP_BASE)
def test_live_weights_on_a_device_without_kernels_get_the_bits_of_the_cpu(
    policy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors of the CPU stand in for the device's: what is computed, and in what memory, is the same.
    monkeypatch.setattr("estune.weights.storage.RUN_LENGTH", 1000)
    plain = Weights(parameters(dtype), policy=policy)
    with monkeypatch.context() as patch:
        patch.setattr("estune.weights.weights.open_storage", HostStorage)
        weights = Weights(parameters(dtype), policy=policy, threads=3)
    assert type(weights.storage) is HostStorage
    places = [p.tensor.data_ptr() for p in weights.parameters]
    for step in range(2):
        update = Update(step, (Member(3), Member(4, -1)), (0.25, -0.5), decay=-0.125)
        for each in (plain, weights):
            each.perturb(Member(7, -1), 0.01)
        assert same(bits(weights.parameters), bits(plain.parameters))
        for each in (plain, weights):
            each.apply(update)
            each.restore()
        assert same(bits(weights.parameters), bits(plain.parameters))
        assert weights.fingerprint() == plain.fingerprint()
    assert [p.tensor.data_ptr() for p in weights.parameters] == places


def test_the_base_of_a_device_without_kernels_is_the_cpus() -> None:
    away = Run(torch.empty(4, device="meta"), torch.zeros(4), key=1, noise=1)
    assert type(open_storage([away], 1)) is HostStorage
    here = Run(torch.empty(4), torch.zeros(4), key=1, noise=1)
    assert type(open_storage([here], 1)) is CpuStorage


def test_inplace_drifts_and_says_so() -> None:
    ps = parameters(torch.bfloat16)
    weights, original = Weights(ps, policy="inplace"), bits(ps)
    assert weights.drift().changed == 0
    for seed in range(30):
        weights.perturb(Member(seed), 0.01)
    drift = weights.drift()  # the tensors are so small that the sample is all of them
    changed = torch.cat([(a != b).view(-1) for a, b in zip(bits(ps), original, strict=True)])
    assert changed.float().mean() > 0.2
    assert drift.changed == pytest.approx(float(changed.float().mean()))
    assert 0 < drift.rms < 0.01
    weights.apply(Update(0, (Member(3),), (0.25,)))
    assert weights.drift().changed == 0


def test_correlated_noise_is_equal_for_all_tensors() -> None:
    shapes = {"a": (4, 8), "b": (4, 8)}
    ps = [Parameter(name, torch.zeros(shape)) for name, shape in shapes.items()]
    Weights(ps, noise="correlated").perturb(Member(5), 1.0)
    assert torch.equal(ps[0].tensor, ps[1].tensor)
    assert torch.equal(ps[0].tensor.view(-1), torch.from_numpy(reference.normal_by_id(5, 0, 0, 32)))
    Weights(ps).perturb(Member(5), 1.0)
    assert not torch.equal(ps[0].tensor, ps[1].tensor)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "gemma", "gpt2", "mistral", "gpt_neox"])
def test_every_parameter_is_found_in_the_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / name, name))
    model = build_model(name)
    found = trained_parameters(model, checkpoint.tensors)
    assert sum(p.tensor.numel() for p in found) == sum(p.numel() for p in model.parameters())
    for p in found:
        assert torch.equal(p.tensor.view(-1), torch.from_numpy(checkpoint.tensors[p.name].read())), p.name


def test_tied_weights_are_one_parameter_and_move_once(tmp_path: Path) -> None:
    model = build_model("qwen2", tie_word_embeddings=True)
    found = trained_parameters(model, model.state_dict())
    embedding = next(p for p in found if p.name == "model.embed_tokens.weight")
    assert embedding.aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in {p.name for p in found}
    before = model.lm_head.weight.clone()
    Weights(found).perturb(Member(2), 0.01)
    expected = before + np.float32(0.01) * noise(2, "model.embed_tokens.weight", before)
    assert torch.equal(model.lm_head.weight, expected)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_prefix_that_the_checkpoint_lacks_is_found() -> None:
    model = build_model("gpt2")  # as on the hub, where GPT-2's names lack "transformer."
    tensors = {n.removeprefix("transformer."): t for n, t in model.named_parameters()}
    assert {p.name for p in trained_parameters(model, tensors)} == set(tensors)


def test_names_that_transformers_changes_on_loading_are_followed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "neox", "gpt_neox"))
    assert "embed_out.weight" in checkpoint.tensors  # the model's lm_head.weight
    assert {p.name for p in trained_parameters(build_model("gpt_neox"), checkpoint.tensors)} == set(checkpoint.tensors)


def test_patterns_choose_parameters() -> None:
    model = build_model("llama")
    tensors = dict(model.named_parameters())
    for pattern, wanted in (
        ("*.mlp.*", {n for n in tensors if ".mlp." in n}),
        ("*.mlp.*, lm_head.weight", {n for n in tensors if ".mlp." in n or n == "lm_head.weight"}),
        ("*, !*.mlp.*", {n for n in tensors if ".mlp." not in n}),
        ("!*norm*,! *.0.*", {n for n in tensors if "norm" not in n and ".0." not in n}),
        ("auto, !*.mlp.*", {n for n in tensors if ".mlp." not in n}),
    ):
        assert {p.name for p in trained_parameters(model, tensors, pattern)} == wanted
    for pattern in ("layer*", "*.mlp.*, layer*", "*, !layer*"):  # a slip beside one that fits
        with pytest.raises(EstuneError, match=r"no parameter's name fits the pattern 'layer\*'"):
            trained_parameters(model, tensors, pattern)
    with pytest.raises(EstuneError, match=r"^train_parameters: \*, !model\*, !lm_head\* leaves no parameter to train"):
        trained_parameters(model, tensors, "*, !model*, !lm_head*")
    assert not fits("vision.proj.weight", "auto, !*.gate.weight", spoken=False)
    assert fits("vision.proj.weight", "auto, vision.*", spoken=False)
    del tensors["model.norm.weight"]
    with pytest.raises(EstuneError, match=r"parameter model\.norm\.weight is not made of the checkpoint's tensors"):
        trained_parameters(model, tensors)


def test_types_without_kernels_are_refused() -> None:
    with pytest.raises(EstuneError, match="float64: there are kernels for float32, bfloat16, float16"):
        Weights([Parameter("a", nn.Linear(3, 3).double().weight)])
    with pytest.raises(EstuneError, match="weights on meta"):
        Weights([Parameter("a", nn.Linear(3, 3, device="meta").weight)])


def test_a_base_on_the_host_is_pinned_for_the_weights_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def pinned(size: int) -> np.ndarray[Any, Any]:
        assert current == [live]
        return np.zeros(size, np.uint8)

    live = torch.ones(1)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr("estune.weights.base.pinned_bytes", pinned)
    (base,) = make_base([live], None, on_host=True)
    assert torch.equal(base, live)

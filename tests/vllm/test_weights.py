"""Weights in vLLM's processes, fused, padded, replicated and sharded, against those of transformers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.weights.checkpoint import Checkpoint
from estune.weights.tensors import widen
from tests.vllm.pairs import UPDATE, gathered, live, open_reference, open_weights

# Architecture, changes to its shape, type, processes. One key and value head for two processes is held by both.
MODELS: list[tuple[str, dict[str, Any], str, int]] = [
    ("qwen2", {}, "float32", 1),
    ("qwen2", {}, "bfloat16", 1),
    ("qwen3", {}, "float32", 1),
    ("llama", {}, "bfloat16", 1),
    ("mistral", {}, "float32", 1),
    ("qwen2", {}, "float32", 2),
    ("qwen3", {"num_key_value_heads": 1}, "bfloat16", 2),
]
IDS = [f"{kind}-{dtype}-{parallel}" for kind, _, dtype, parallel in MODELS]
POLICIES = ["master", "copy"]


@pytest.fixture(params=MODELS, ids=IDS, scope="module")
def model(request: Any, saved: Callable[..., Path], engines: Callable[..., Any]) -> tuple[Any, Path, str]:
    kind, changes, dtype, parallel = request.param
    path = saved(kind, **changes)
    return engines(path, dtype, parallel), path, dtype


def padding(engine: Any) -> list[dict[str, bytes]]:
    """What belongs to no checkpoint tensor, by process and by vLLM's name."""
    found = []
    for places, tensors in zip(engine.call("placed"), engine.call("live_arrays"), strict=True):
        free = {name: np.ones(len(a) if a.ndim else 1, bool) for name, a in tensors.items()}
        for place in places:
            free[place.tensor][place.row : place.row + place.part.rows] = False
        found.append({name: tensors[name][mask].tobytes() for name, mask in free.items() if mask.any()})
    return found


@pytest.mark.parametrize(
    ("policy", "noise"),
    [*((policy, "iid") for policy in (*POLICIES, "exact_inplace", "split_master")), ("master", "rank2")],
)
def test_members_updates_and_restores_have_the_bits_of_transformers(model: Any, policy: str, noise: str) -> None:
    engine, path, dtype = model
    if policy == "split_master" and dtype != "bfloat16":
        pytest.skip("the halves are those of bfloat16")
    options: dict[str, Any] = {"weights": policy, "rounding": "nearest", "noise": noise}
    ours, (_, theirs) = open_weights(engine, path, **options), open_reference(path, dtype, **options)
    assert ours.tensors == theirs.tensors
    assert ours.elements == theirs.elements
    assert ours.rule == theirs.rule
    before, rest = engine.call("digests"), padding(engine)
    assert ours.fingerprint() == theirs.fingerprint()
    for member in (Member(1), Member(2**64 - 5, -1)):
        ours.perturb(member, 0.02)
        theirs.perturb(member, 0.02)
        found, expected = gathered(engine, theirs), live(theirs)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert engine.call("digests") != before
    for cycle in range(20):
        ours.perturb(Member(cycle), 0.5)
    ours.restore()
    assert engine.call("digests") == before
    ours.apply(UPDATE)
    theirs.apply(UPDATE)
    assert ours.fingerprint() == theirs.fingerprint()
    ours.restore()
    theirs.restore()
    found, expected = gathered(engine, theirs), live(theirs)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert engine.call("digests") != before
    assert padding(engine) == rest
    assert any(rest)
    ours.load(Checkpoint(path))  # as it was, for the next test
    ours.restore()
    assert engine.call("digests") == before


def test_what_is_saved_is_what_transformers_loads(model: Any, tmp_path: Path) -> None:
    engine, path, dtype = model
    ours, (_, theirs) = open_weights(engine, path), open_reference(path, dtype)
    ours.apply(UPDATE)
    theirs.apply(UPDATE)
    Checkpoint(path).write(tmp_path / "saved", ours.runs(), "float32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    for name, array in theirs.base.items():
        for alias in (name, *theirs.tensors[name]):
            assert np.array_equal(found[alias].numpy().reshape(-1), array)
    ours.load(Checkpoint(tmp_path / "saved"))
    assert ours.fingerprint() == theirs.fingerprint()
    ours.load(Checkpoint(path))
    ours.restore()


@pytest.mark.parametrize("policy", POLICIES)
def test_change_and_the_weights_of_another_checkpoint(model: Any, policy: str) -> None:
    engine, path, dtype = model
    ours, (_, theirs) = open_weights(engine, path, weights=policy), open_reference(path, dtype, weights=policy)
    before, base = engine.call("digests"), {name: array.copy() for name, array in theirs.base.items()}
    assert ours.change(Checkpoint(path))[0] == 0
    ours.apply(UPDATE)
    theirs.apply(UPDATE)
    fingerprint = ours.fingerprint()
    pairs = [(as_float(theirs.base[name]), as_float(base[name])) for name in base]
    difference = np.sqrt(sum(np.square(now - then).sum() for now, then in pairs))
    norm = np.sqrt(sum(np.square(then).sum() for _, then in pairs))
    assert difference > 0
    assert ours.change(Checkpoint(path)) == pytest.approx((difference, norm), rel=1e-5)
    ours.restore()
    updated = engine.call("digests")
    ours.show(Checkpoint(path))
    assert engine.call("digests") == before != updated
    assert ours.fingerprint() == fingerprint
    ours.restore()
    assert engine.call("digests") == updated
    ours.load(Checkpoint(path))
    ours.restore()


def as_float(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return widen(stored).astype(np.float64)


def test_parameters_are_chosen_by_a_pattern(model: Any) -> None:
    engine, path, dtype = model
    pattern = "*k_proj*"  # parts of fused tensors
    ours, (_, theirs) = (
        open_weights(engine, path, train_parameters=pattern),
        open_reference(path, dtype, train_parameters=pattern),
    )
    _, whole = open_reference(path, dtype)
    untouched = live(whole)
    ours.perturb(Member(4), 0.1)
    theirs.perturb(Member(4), 0.1)
    found, expected = gathered(engine, whole), live(theirs)
    assert ours.tensors == theirs.tensors
    assert all(np.array_equal(found[name], expected.get(name, untouched[name])) for name in found)
    ours.restore()
    with pytest.raises(EstuneError, match="no parameter's name fits the pattern 'layer"):
        open_weights(engine, path, train_parameters="layer*")


def test_in_place_drift_is_that_of_transformers(saved: Any, engines: Any) -> None:
    path = saved("qwen2")
    engine = engines(path, "bfloat16")
    ours, (_, theirs) = (
        open_weights(engine, path, weights="inplace"),
        open_reference(path, "bfloat16", weights="inplace"),
    )
    for member in (Member(1), Member(2)):
        ours.perturb(member, 0.05)
        theirs.perturb(member, 0.05)
    (found, expected) = ours.drift(), theirs.drift()
    assert found.changed > 0
    assert found.changed == pytest.approx(expected.changed, rel=0.2)  # other elements are watched in fused tensors
    assert ours.fingerprint() == theirs.fingerprint()
    ours.load(Checkpoint(path))


def test_weights_that_moved_are_noticed(saved: Any, engines: Any) -> None:
    path = saved("qwen2")
    engine = engines(path)
    weights = open_weights(engine, path)

    def move(worker: Any) -> None:
        parameter = worker.get_model().lm_head.weight
        worker.kept, parameter.data = parameter.data, parameter.data.clone()

    def move_back(worker: Any) -> None:
        worker.get_model().lm_head.weight.data = worker.kept

    engine.llm.collective_rpc(move)
    with pytest.raises(EstuneError, match=r"vLLM has moved its weights \(model.embed_tokens.weight\)"):
        weights.perturb(Member(1), 0.1)
    engine.llm.collective_rpc(move_back)
    weights.restore()


def test_what_does_not_generate_is_refused(saved: Any, engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that has gone on to weights of its own."""
    path = saved("qwen2")
    engine = engines(path)

    def detach(worker: Any) -> None:
        layer = worker.get_model().model.layers[1].mlp.down_proj
        weight = layer.weight.data.clone()
        layer.quant_method.apply, layer.kept = (lambda a, x, bias: x @ weight.T), layer.quant_method.apply

    def attach(worker: Any) -> None:
        layer = worker.get_model().model.layers[1].mlp.down_proj
        layer.quant_method.apply = layer.kept

    engine.llm.collective_rpc(detach)
    try:
        with pytest.raises(EstuneError, match="do not answer to changes of model.layers.1.mlp.down_proj.weight"):
            open_weights(engine, path)
    finally:
        engine.llm.collective_rpc(attach)
    open_weights(engine, path)

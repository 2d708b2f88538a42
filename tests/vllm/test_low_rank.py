"""Members of low-rank noise in vLLM's slots, over all of a model's weights: against weights with the noise added."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from estune.completion import Sampling
from estune.config import Config
from estune.engines.transformers import TransformersEngine
from estune.engines.vectors import Vectors
from estune.engines.vllm import internals, lora
from estune.engines.vllm.additions import Additions, Rows, Stacks
from estune.engines.vllm.engine import VllmEngine, slots_for
from estune.engines.vllm.low_rank import LowRankWeights, slotted_tensors
from estune.engines.vllm.open import open_vllm
from estune.engines.vllm.parameter_map import Place
from estune.engines.vllm.slots import OuterProducts
from estune.engines.vllm.weights import VllmWeights
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.noise.reference import low_rank_by_id, normal_by_id, tensor_id
from estune.study.estimate.run import estimate_run
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate
from tests.visions import save_vision
from tests.vllm.in_slots import MEMBERS, assert_members_are_their_own
from tests.vllm.pairs import PROMPTS, UPDATE, open_reference

SIGMA = 0.1
GREEDY = Sampling(10)
MATRICES = "*_proj.weight"
SCALES = {"*.down_proj.weight": 0.25, "*norm.weight": 2.0, "*embed_tokens.weight": 0.5}
OPTIONS: dict[str, Any] = {"noise": "rank4", "sigma_scale": SCALES}


def settings(path: Path, **changes: Any) -> Config:
    given = {"engine": "vllm", "device": "cpu", "dtype": "float32", "batch_size": 32, "vllm_max_loras": 4}
    return Config(model=str(path), max_new_tokens=64, **{**given, **OPTIONS, **changes})


@contextmanager
def opened_with(path: Path, **changes: Any) -> Iterator[tuple[VllmEngine, LowRankWeights]]:
    engine, weights = open_vllm(Checkpoint(path), settings(path, **changes))
    try:
        assert isinstance(weights, LowRankWeights)
        yield engine, weights
    finally:
        engine.close()


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


@pytest.fixture(scope="module")
def opened(tiny: Path, started: dict[Any, Any]) -> tuple[VllmEngine, LowRankWeights]:
    engine, weights = open_vllm(Checkpoint(tiny), settings(tiny))
    started[tiny, "in slots", 1] = engine
    assert isinstance(weights, LowRankWeights)
    return engine, weights


def perturbed(
    path: Path, member: Member, *, rank: int = 4, trained: str = "*", scales: Mapping[str, float] = SCALES
) -> TransformersEngine:
    """The model in transformers, with the noise of its tensors added by NumPy."""
    engine = TransformersEngine(path, dtype="float32")
    for name, tensor in engine.model.named_parameters():
        if not fnmatch(name, trained):
            continue
        key, factor = tensor_id(name), next((f for p, f in scales.items() if fnmatch(name, p)), 1.0)
        if tensor.ndim > 1:
            noise = low_rank_by_id(member.seed, key, tensor.shape[1], rank, 0, tensor.numel())
        else:
            noise = normal_by_id(member.seed, key, 0, tensor.numel())
        tensor += torch.from_numpy(np.float32(member.sign * SIGMA * factor) * noise.reshape(tensor.shape))
    return engine


def assert_slots_complete_as_perturbed(engine: VllmEngine, weights: LowRankWeights, path: Path, **noise: Any) -> None:
    weights.take(MEMBERS, SIGMA)
    found = engine.generate_each(3, PROMPTS, GREEDY)
    texts = PROMPTS[::4]
    for number, member in enumerate(MEMBERS):
        theirs = perturbed(path, member, **noise)
        assert theirs.generate(PROMPTS, GREEDY) == found[number]
        scores = theirs.score([row[:1] for row in texts], [row[1:] for row in texts])
        for ours, expected in zip(engine.scores_in([number] * len(texts), texts), scores, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)
    assert len({each.text for member in found for each in member}) > len(PROMPTS)
    base = TransformersEngine(path, dtype="float32")
    assert engine.generate(PROMPTS, GREEDY) == base.generate(PROMPTS, GREEDY)


def test_slots_complete_as_weights_with_the_noise_added(opened: tuple[VllmEngine, LowRankWeights], tiny: Path) -> None:
    assert_slots_complete_as_perturbed(*opened, tiny)


@pytest.mark.parametrize(
    ("kind", "rank", "trained"),
    [
        ("embedded", 1, "*"),
        ("llama", 1, "*"),  # its head is its own
        ("llama", 8, "*"),
        ("qwen3", 2, "*"),  # norms of queries and keys
        ("qwen2", 2, MATRICES),
    ],
)
@pytest.mark.usefixtures("alone_here")
def test_they_do_so_for_other_models_and_ranks(saved: Callable[..., Path], kind: str, rank: int, trained: str) -> None:
    path = locate("tiny") if kind == "embedded" else saved(kind)
    with opened_with(path, noise=f"rank{rank}", train_parameters=trained, sigma_scale={}) as (engine, weights):
        assert_slots_complete_as_perturbed(engine, weights, path, rank=rank, trained=trained, scales={})


def test_rows_without_a_slot_are_the_base_s_to_the_bit(
    opened: tuple[VllmEngine, LowRankWeights], engines: Callable[..., Any], tiny: Path
) -> None:
    """Whatever slots rows had before, and beside members."""
    engine, weights = opened
    plain = engines(tiny)
    texts = [row[:1] for row in PROMPTS], [row[1:] for row in PROMPTS]
    weights.take(MEMBERS, SIGMA)
    engine.generate_each(3, PROMPTS, GREEDY)
    assert engine.digest() == plain.digest()
    assert engine.score(*texts) == plain.score(*texts)
    with engine.here() as llm:
        adapters = [engine.slot(0), None, engine.slot(2)]
        found = internals.generate(llm, PROMPTS, GREEDY, engine.end_ids, adapters)
    count = len(PROMPTS)
    assert found[count : 2 * count] == [each.token_ids for each in plain.generate(PROMPTS, GREEDY)]
    assert found[:count] != found[2 * count :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_is_its_own_whoever_is_beside_it(
    opened: tuple[VllmEngine, LowRankWeights], temperature: float
) -> None:
    assert_members_are_their_own(*opened, SIGMA, temperature=temperature)


def test_members_are_around_the_base_as_it_is_after_an_update(
    opened: tuple[VllmEngine, LowRankWeights], tiny: Path, tmp_path: Path
) -> None:
    engine, weights = opened
    _, theirs = open_reference(tiny, "float32", noise="rank4", scales=weights.rule.scales)
    assert weights.tensors == theirs.tensors
    start = weights.fingerprint()
    assert start == theirs.fingerprint()
    weights.apply(UPDATE)
    theirs.apply(UPDATE)
    assert weights.fingerprint() == theirs.fingerprint() != start
    weights.restore()
    Checkpoint(tiny).write(tmp_path / "after", weights.runs(), "float32")
    weights.take(MEMBERS[:2], SIGMA)
    found = engine.generate_each(2, PROMPTS, GREEDY)
    assert found == [perturbed(tmp_path / "after", member).generate(PROMPTS, GREEDY) for member in MEMBERS[:2]]
    weights.load(Checkpoint(tiny))
    weights.restore()
    assert weights.fingerprint() == start


def test_no_base_need_be_kept_beside_the_live_weights(opened: tuple[VllmEngine, LowRankWeights], tiny: Path) -> None:
    """As slots leave these alone. Where there are none, patches take such members back to the bit."""
    engine, _ = opened
    before = engine.call("digests")
    changed = settings(tiny, weights="exact_inplace")
    weights = LowRankWeights(engine, Checkpoint(tiny), changed, base_on_host=False)
    assert engine.call("digests") == before
    weights.take(MEMBERS[:1], SIGMA)
    assert engine.generate_each(1, PROMPTS, GREEDY) == [perturbed(tiny, MEMBERS[0]).generate(PROMPTS, GREEDY)]
    alone = VllmWeights(engine, Checkpoint(tiny), changed, base_on_host=False)
    alone.perturb(MEMBERS[0], SIGMA)
    assert engine.call("digests") != before
    alone.restore()
    assert engine.call("digests") == before
    LowRankWeights(engine, Checkpoint(tiny), settings(tiny), base_on_host=False)


def test_the_loader_sees_the_model_without_its_lora_layers(opened: tuple[VllmEngine, LowRankWeights]) -> None:
    """As loaders of some models, and of most before vLLM 0.32, look for parameters by their whole names."""

    def names(worker: Any) -> list[list[str]]:
        model = worker.model_runner.get_model()
        before = [name for name, _ in model.named_parameters()]
        with lora.unwrapped(worker):
            within = [name for name, _ in model.named_parameters()]
        return [before, within, [name for name, _ in model.named_parameters()]]

    ((before, within, after),) = opened[0].llm.collective_rpc(names)
    assert after == before
    assert within == [name.replace(".base_layer", "") for name in before]
    assert "model.layers.0.self_attn.qkv_proj.weight" in set(within) - set(before)


def test_slots_that_hold_or_mean_something_else_are_found(
    opened: tuple[VllmEngine, LowRankWeights], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what vLLM makes of a file, and by completions of perturbed weights."""
    engine, _ = opened

    def scaled(self: Vectors, member: Member, sigma: float) -> torch.Tensor:
        return draw(self, member, 1.01 * sigma)

    def one_lacks(worker: Any, adapter: Path, tensors: dict[str, torch.Tensor]) -> list[lora.Place]:
        return places(worker, adapter, tensors)[:-1]

    def inverted(self: LowRankWeights, folder: Path, member: Member, sigma: float) -> None:
        save(self, folder, Member(member.seed, -member.sign), sigma)

    def inverted_too(self: OuterProducts, members: list[Member], sigma: float) -> None:
        take(self, [Member(member.seed, -member.sign) for member in members], sigma)

    def inverted_as_well(self: OuterProducts, slot: int, member: Member, sigma: float, names: Collection[str]) -> None:
        take_part(self, slot, Member(member.seed, -member.sign), sigma, names)

    def turned(self: Additions, place: Place, live: torch.Tensor, *vectors: torch.Tensor) -> list[lora.Place]:
        return [replace(found, source=found.source.flip(1)) for found in beside(self, place, live, *vectors)]

    def without(name: str) -> Callable[..., list[lora.Place]]:
        return lambda self, place, *others: [] if place.name == name else beside(self, place, *others)

    def of_another_row(self: Rows, x: torch.Tensor) -> torch.Tensor:
        return own(self, x).flip(0)

    own = Rows.of
    draw, places, save, beside = Vectors.draw, lora.places, LowRankWeights.write_member, Additions.places
    take, take_part = OuterProducts.take, OuterProducts.take_part
    signs = [(OuterProducts, "take", inverted_too), (OuterProducts, "take_part", inverted_as_well)]
    other, meaning = "vLLM makes something else of the same values in a file", "are not those by perturbed"
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.v_proj.bias"
    wrong: list[tuple[list[tuple[Any, str, Any]], str]] = [
        ([(Vectors, "draw", scaled)], other),
        ([(lora, "places", one_lacks)], other),
        ([(LowRankWeights, "write_member", inverted), *signs], f"{meaning} matrices"),
        ([(Additions, "places", turned)], f"{meaning} tables"),
        ([(Rows, "of", of_another_row)], f"{meaning} tables"),
        ([(Additions, "places", without(norm))], f"do not answer to changes of {norm}"),
        ([(Additions, "places", without(bias))], f"do not answer to changes of {bias}"),
    ]
    for changes, why in wrong:
        with monkeypatch.context() as patch:
            for change in changes:
                patch.setattr(*change)
            with pytest.raises(EstuneError, match=why):
                LowRankWeights(engine, Checkpoint(tiny), settings(tiny), base_on_host=False)
    LowRankWeights(engine, Checkpoint(tiny), settings(tiny), base_on_host=False)


def test_what_has_no_slots_is_said_with_what_to_set(
    saved: Callable[..., Path], tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def matrices(path: Path, **changes: Any) -> list[str]:
        caplog.clear()
        config = settings(path, **changes)
        return [n for n, shape in slotted_tensors(Checkpoint(path), config, on_cpu=True).items() if len(shape) == 2]

    assert len(matrices(tiny)) == 15
    assert len(matrices(tiny, train_parameters="*.q_proj.weight,*norm*")) == 2
    assert not caplog.records
    assert matrices(tiny, train_parameters="*norm*") == []
    assert "train_parameters=*norm* trains no matrix of a layer" in caplog.text
    assert caplog.text.rstrip().endswith("in one batch set train_parameters=*_proj.weight")
    other = saved("gpt_neox")
    assert matrices(other, train_parameters="*.bias") == []
    instead = caplog.text.rstrip().rpartition("train_parameters=")[2]
    assert sorted(instead.split(",")) == [
        "*.dense.weight",
        "*.dense_4h_to_h.weight",
        "*.dense_h_to_4h.weight",
        "*.query_key_value.weight",
    ]
    assert len(matrices(other, train_parameters=instead)) == 8
    assert matrices(saved("qwen3_moe")) == []
    assert "trains model.layers.0.mlp.experts.0.down_proj.weight too, for which vLLM has no slots" in caplog.text
    assert caplog.text.rstrip().endswith("*.v_proj.weight")
    seer = save_vision(tmp_path, "idefics3")
    assert matrices(seer) == []
    assert "trains lm_head.weight too, for which vLLM has no slots" in caplog.text
    instead = caplog.text.rstrip().rpartition("train_parameters=")[2]
    assert all("text_model" in name for name in matrices(seer, train_parameters=instead))
    assert len(matrices(seer, train_parameters=instead)) == 14
    for silent in ({"noise": "iid"}, {"weights": "inplace"}, {"vllm_max_loras": 1}):
        assert matrices(tiny, **silent) == []
        assert not caplog.records


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.usefixtures("alone_here")
def test_slots_take_the_memory_that_is_estimated(tiny: Path, rank: int) -> None:
    def taken(worker: Any) -> int:
        stacks: list[Stacks] = list(worker.model_runner.estune_additions.stacks.values())
        beside = [part for each in stacks for part in (each.rows, each.columns) if part is not None]
        return sum(tensor.nbytes for tensor in [*lora.stacked(worker).values(), *beside])

    given = [f"model={tiny}", "engine=vllm", f"noise=rank{rank}", "dtype=float32", "device=cpu", "vllm_max_loras=4"]
    found = estimate_run(None, given)
    (expected,) = (item.amount for item in found.memory if item.name == "members in slots")
    with opened_with(tiny, noise=f"rank{rank}", sigma_scale={}) as (engine, _):
        (held,) = engine.llm.collective_rpc(taken)
    padding = 5 * rank * (-found.shape.vocabulary % 64)  # vLLM's, of the table's rows
    assert held == expected + 4 * (padding - found.shape.vectors(rank))


def test_groups_of_members_have_slots_for_one(tiny: Path) -> None:
    given: dict[str, Any] = {"batch_size": None, "vllm_max_loras": None, "population": 12, "prompts_per_step": 2}
    assert slots_for(settings(tiny, **given, prompt_groups=2), on_cpu=True) == 6
    assert slots_for(settings(tiny, **given, evaluate_base=True), on_cpu=True) == 13

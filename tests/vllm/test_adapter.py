"""Adapters in vLLM: slots against files that vLLM loads and against merged weights, runs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from estune.completion import Sampling
from estune.config import Config, parse
from estune.engines.transformers import TransformersEngine
from estune.engines.vllm import internals, lora
from estune.engines.vllm.adapted import AdapterWeights
from estune.engines.vllm.engine import VllmEngine, slots_for
from estune.engines.vllm.open import open_vllm
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.noise.reference import normal_by_id, tensor_id
from estune.weights.adapted import open_checkpoint
from estune.weights.adapters import CONFIG, PREFIX, WEIGHTS, Adapter
from estune.weights.checkpoint import Checkpoint
from tests.vllm.in_slots import MEMBERS, assert_members_are_their_own
from tests.vllm.pairs import PROMPTS, UPDATE

pytestmark = pytest.mark.usefixtures("own_cache")

ADAPTER = Adapter(rank=3, target=["q_proj", "v_proj", "gate_proj", "down_proj"], alpha=12)
SCALE, SIGMA = 4.0, 0.2
GREEDY = Sampling(10)


def settings(path: Path, **changes: Any) -> Config:
    given = {"engine": "vllm", "device": "cpu", "dtype": "float32", "batch_size": 32, "vllm_max_loras": 4}
    return Config(model=str(path), adapter=ADAPTER, max_new_tokens=64, **{**given, **changes})


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


@pytest.fixture(scope="module")
def opened(tiny: Path, own_cache: None, started: dict[Any, Any]) -> tuple[VllmEngine, AdapterWeights]:
    engine, weights = open_vllm(open_checkpoint(tiny, ADAPTER), settings(tiny))
    started[tiny, "an adapter", 1] = engine
    assert isinstance(weights, AdapterWeights)
    return engine, weights


def tensors_of(adapter: Path, member: Member, sigma: float) -> dict[str, Any]:
    """A member's adapter, by NumPy."""
    return {
        name: tensor
        + np.float32(member.sign * sigma)
        * normal_by_id(member.seed, tensor_id(name), 0, tensor.size).reshape(tensor.shape)
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }


def saved_adapter(adapter: Path, folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**json.loads((adapter / CONFIG).read_text()), **changes}))
    return folder


def merged(path: Path, tensors: dict[str, Any]) -> TransformersEngine:
    """The model in transformers with an adapter added to its matrices."""
    engine = TransformersEngine(path, dtype="float32")
    matrices = dict(engine.model.named_modules())
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            matrices[name.removeprefix(PREFIX).partition(".lora_A.")[0]].weight += SCALE * torch.from_numpy(b @ a)
    return engine


def test_slots_complete_as_files_that_vllm_loads_and_as_merged_weights(
    opened: tuple[VllmEngine, AdapterWeights], tiny: Path, tmp_path: Path
) -> None:
    engine, weights = opened
    adapter = open_checkpoint(tiny, ADAPTER).path
    weights.take(MEMBERS, SIGMA)
    found = engine.generate_each(3, PROMPTS, GREEDY)
    for number, member in enumerate(MEMBERS):
        tensors = tensors_of(adapter, member, SIGMA)
        folder = saved_adapter(adapter, tmp_path / str(number), tensors)
        engine.fill(Checkpoint(folder), 3)
        with engine.here() as llm:
            by_file = internals.generate(llm, PROMPTS, GREEDY, engine.end_ids, [lora.request(folder, 3)])
        assert [each.token_ids for each in found[number]] == by_file
        assert merged(tiny, tensors).generate(PROMPTS, GREEDY) == found[number]
    assert len({each.text for member in found for each in member}) > len(PROMPTS)
    weights.restore()
    assert engine.generate(PROMPTS, GREEDY) == TransformersEngine(tiny, dtype="float32").generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_member_is_its_own_whoever_is_beside_it(
    opened: tuple[VllmEngine, AdapterWeights], temperature: float
) -> None:
    assert_members_are_their_own(*opened, SIGMA, temperature=temperature)


def test_an_update_is_the_papers_over_the_adapters_tensors(
    opened: tuple[VllmEngine, AdapterWeights], tiny: Path, tmp_path: Path
) -> None:
    engine, weights = opened
    checkpoint = open_checkpoint(tiny, ADAPTER)
    start = weights.fingerprint()
    weights.apply(UPDATE)
    assert weights.fingerprint() != start
    checkpoint.write(tmp_path / "after", weights.runs(), "float32")
    weights.load(Checkpoint(tmp_path / "after"))
    expected = {}
    for name, tensor in load_file(checkpoint.path / WEIGHTS).items():
        total = tensor * np.float32(1 + UPDATE.decay)
        for seed, coefficient in UPDATE.pairs:
            noise = normal_by_id(seed, tensor_id(name), 0, tensor.size).reshape(tensor.shape)
            total += np.float32(coefficient) * noise
        expected[name] = total
    for name, tensor in load_file(tmp_path / "after" / WEIGHTS).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6)
    weights.restore()
    assert engine.generate(PROMPTS, GREEDY) == merged(tiny, expected).generate(PROMPTS, GREEDY)
    weights.load(checkpoint)
    weights.restore()
    assert weights.fingerprint() == start


def test_a_map_that_is_wrong_is_found(
    opened: tuple[VllmEngine, AdapterWeights], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own loading of a file tells."""
    engine, _ = opened
    places = lora.places

    def unscaled(*given: Any) -> list[lora.Place]:
        return [dataclasses.replace(place, scale=1.0) for place in places(*given)]

    def without_the_last(*given: Any) -> list[lora.Place]:
        return places(*given)[:-1]

    for wrong in (unscaled, without_the_last):
        with monkeypatch.context() as patch:
            patch.setattr(lora, "places", wrong)
            with pytest.raises(EstuneError, match="vLLM makes something else of the same values in a file"):
                AdapterWeights(engine, open_checkpoint(tiny, ADAPTER), settings(tiny), base_on_host=False)
    AdapterWeights(engine, open_checkpoint(tiny, ADAPTER), settings(tiny), base_on_host=False)


@pytest.mark.parametrize("rank", [4, 1])
def test_products_by_slot_are_vllms(rank: int) -> None:
    """Of rows in any order, some of them without a slot, to which vLLM's reference adds the last one's."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from estune.engines.vllm.cpu_lora import BySlot

    a = tuple(torch.randn(3, 1, rank, 10) for _ in range(2))
    b = tuple(torch.randn(3, 1, outputs, rank) for outputs in (6, 5))
    for rows in ([1, 1, 2, 2, 3, 3], [2, 2, 3, 1, 3, 3, 1], [3, 3], [2, 0, 1, 0], [0, 0]):
        x, y = torch.randn(len(rows), 10), torch.randn(len(rows), 11)
        found, expected = y.clone(), y.clone()
        for kind, out in ((BySlot, found), (PunicaWrapperCPU, expected)):
            wrapper = kind(64, 16, "cpu")
            wrapper.update_metadata(LoRAMapping(tuple(rows), tuple(rows), is_prefill=True), [1, 2, 3], 4, 330)
            wrapper.add_lora_linear(out, x, a, b, 0.5, (6, 5))
        has = torch.tensor(rows) > 0
        torch.testing.assert_close(found[has], expected[has])
        assert torch.equal(found[~has], y[~has])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slot_holds_what_vllm_makes_of_a_file(dtype: torch.dtype) -> None:
    """By a factor that the type does not hold."""
    from vllm.lora.lora_weights import LoRALayerWeights

    a, b = torch.randn(3, 96), torch.randn(64, 3)
    stacked = torch.full((2, 1, 8, 96), 7.0, dtype=dtype), torch.full((2, 1, 64, 8), 7.0, dtype=dtype)
    lora.write([lora.Place(stacked[0], a, 1.0), lora.Place(stacked[1], b, 1.4)], 0)
    theirs = LoRALayerWeights("m", 3, 4, a.to(dtype), b.to(dtype), scaling=1.4).optimize()
    assert torch.equal(stacked[0][0, 0, :3], theirs.lora_a)
    assert torch.equal(stacked[1][0, 0, :, :3], theirs.lora_b)
    assert (stacked[0][1] == 7).all()
    assert (stacked[1][0, 0, :, 3:] == 7).all()


@pytest.mark.parametrize(
    ("changes", "extra", "why"),
    [
        ({"use_dora": True}, None, "DoRA"),
        ({"bias": "all"}, None, "bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, None, "Unsupported modules_to_save"),
        ({}, "base_model.model.lm_head.weight", "has no place for base_model.model.lm_head.weight"),
        ({"r": 600}, None, "LoRA rank 600 is greater"),
    ],
)
def test_adapters_that_vllm_has_no_way_for_are_refused_before_anything_is_loaded(
    changes: dict[str, Any], extra: str | None, why: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "start", lambda *given, **options: pytest.fail("it is loaded"))
    adapter = open_checkpoint(tiny, ADAPTER).path
    tensors = load_file(adapter / WEIGHTS) | ({extra: np.zeros((2, 2), np.float32)} if extra else {})
    folder = saved_adapter(adapter, tmp_path / "adapter", tensors, **changes)
    with pytest.raises(EstuneError, match=f"engine=vllm cannot run adapter .*{why}.*; use engine=transformers$"):
        VllmEngine(Checkpoint(folder), settings(tiny))


def test_an_adapter_over_quantised_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = open_checkpoint(tiny, ADAPTER).path
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    said = {**json.loads((base / "config.json").read_text()), "quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(said))
    place = {"base_model_name_or_path": str(base)}
    folder = saved_adapter(adapter, tmp_path / "adapter", load_file(adapter / WEIGHTS), **place)
    with pytest.raises(EstuneError, match="an adapter over quantised weights .fp8. is trained by engine=transformers"):
        open_vllm(Checkpoint(folder), settings(tiny))


def test_a_module_without_a_layer_for_adapters_is_refused(
    opened: tuple[VllmEngine, AdapterWeights], tiny: Path, tmp_path: Path
) -> None:
    engine, _ = opened
    adapter = open_checkpoint(tiny, ADAPTER).path
    tensors = load_file(adapter / WEIGHTS)
    other = {name.replace("q_proj", "o_proj"): tensor for name, tensor in tensors.items()}
    folder = saved_adapter(adapter, tmp_path / "adapter", other)
    with pytest.raises(EstuneError, match=r"vLLM has no LoRA layer for model.layers.0.self_attn.o_proj; use engine="):
        AdapterWeights(engine, Checkpoint(folder), settings(tiny), base_on_host=False)
    strange = {name.replace("q_proj", "r_proj"): tensor for name, tensor in tensors.items()}
    folder = saved_adapter(adapter, tmp_path / "strange", strange)
    with pytest.raises(EstuneError, match=r"engine=vllm cannot run adapter .*r_proj"):
        AdapterWeights(engine, Checkpoint(folder), settings(tiny), base_on_host=False)
    AdapterWeights(engine, open_checkpoint(tiny, ADAPTER), settings(tiny), base_on_host=False)


def test_how_many_slots_there_are(tiny: Path) -> None:
    def slots(**changes: Any) -> int:
        given = {"batch_size": None, "vllm_max_loras": None, "population": 30, "prompts_per_step": 20, **changes}
        return slots_for(settings(tiny, **given), on_cpu=True)

    assert slots() == 12  # 256 rows
    assert slots(prompts_per_step=2) == 30
    assert slots(prompts_per_step=2, population=80) == 32
    assert slots(prompts_per_step=2, workers=4) == 8
    assert slots(prompts_per_step=500) == 1
    assert slots(vllm_max_loras=7) == 7
    lora.refuse_type("bfloat16", torch.device("cuda"))
    with pytest.raises(EstuneError, match="weights are float32: set dtype=bfloat16, or engine=transformers"):
        lora.refuse_type("float32", torch.device("cuda"))
    with pytest.raises(EstuneError, match="leave out workers_at or adapter"):
        parse({"adapter": {"rank": 2}, "workers_at": "http://127.0.0.1:1"})

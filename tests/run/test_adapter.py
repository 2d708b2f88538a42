"""Runs that train an adapter: what PEFT itself makes of it, the same bits by every way, and another base refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.config import Config, parse
from estune.engines.cpu.fused import FusedDecoder
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.merge import merge
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.noise import reference
from estune.run.evaluate import evaluate_model
from estune.run.load import load
from estune.run.make import make_sampling
from estune.run.trainer import Trainer
from estune.weights.adapted import open_checkpoint
from estune.weights.adapters import Adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate, pinned
from tests.models import save_model
from tests.runs import PROMPTS, make_config, make_task, substance, trained

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's
]

FILE = "adapter_model.safetensors"
NAME = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"


def adapted(output: Path, model: Path, **changes: Any) -> Config:
    adapter = {"rank": 3, "target": "q_proj,down_proj", "alpha": 12, **changes.pop("adapter", {})}
    return make_config(output, model, **{"sigma": 0.2, "learning_rate": 0.2, "adapter": adapter, **changes})


def with_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def texts_of(model: Any, base: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for prompt in PROMPTS[::3]:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        found.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_a_new_adapter_is_noise_by_pefts_names_and_changes_nothing(model: Path) -> None:
    checkpoint = open_checkpoint(model, Adapter(rank=3, target=["q_proj", "down_proj"], seed=5))
    tensors = load_file(checkpoint.path / FILE)
    assert len(tensors) == 2 * 2 * 3
    assert not any(tensors[name].any() for name in tensors if ".lora_B." in name)
    drawn = reference.normal_by_id(5, reference.tensor_id(NAME.format("A")), 0, 3 * 96)
    expected = drawn * np.float32(1 / np.sqrt(3 * 96))
    assert tensors[NAME.format("A")].tobytes() == expected.tobytes()
    base = AutoModelForCausalLM.from_pretrained(model)
    assert texts_of(with_peft(model, checkpoint.path), model) == texts_of(base, model)


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("target", ["q_proj,down_proj", "all-linear"])  # some of the projections of one input, or all
def test_peft_loads_what_was_trained_and_says_the_same(kind: str, target: str, model: Path, tmp_path: Path) -> None:
    base = model if kind == "fused" else save_model(tmp_path / "base", hidden_act="gelu")  # no kernel has it
    before = (base / "model.safetensors").read_bytes()
    folder = trained(adapted(tmp_path / "run", base, adapter={"target": target}))
    assert (base / "model.safetensors").read_bytes() == before
    plain = with_peft(base, folder / "final")
    texts = texts_of(plain, base)
    assert texts != texts_of(AutoModelForCausalLM.from_pretrained(base), base)
    engine = TransformersEngine(folder / "final")
    assert isinstance(engine.decoder, FusedDecoder) == (kind == "fused")
    sampling = make_sampling(make_config(tmp_path, base))
    assert [c.text for c in engine.generate(engine.encode(PROMPTS[::3]), sampling)] == texts
    assert texts_of(load(folder), base) == texts
    assert texts_of(peft.AutoPeftModelForCausalLM.from_pretrained(folder / "final"), base) == texts
    assert texts_of(AutoModelForCausalLM.from_pretrained(folder / "final"), base) == texts


@pytest.mark.parametrize("kind", ["embedded", "gguf"])
def test_a_model_without_a_directory_of_the_users_is_found_by_peft_and_by_its_name(
    kind: str, tmp_path: Path, own_cache: Path
) -> None:
    name = "tiny"
    if kind == "gguf":
        pytest.importorskip("gguf")
        from tests.weights.test_gguf import write

        name = str(tmp_path / "m.gguf")
        write(tmp_path / "m.gguf")
    folder = trained(adapted(tmp_path / "run", Path(name), steps=1))
    base = locate(name)
    place = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert (place["base_model_name_or_path"], place["revision"]) == (str(base), pinned(name))
    texts = texts_of(load(folder), base)
    assert texts != texts_of(AutoModelForCausalLM.from_pretrained(base), base)
    assert texts_of(peft.AutoPeftModelForCausalLM.from_pretrained(folder / "final"), base) == texts
    shutil.rmtree(own_cache)  # as on another machine
    place["base_model_name_or_path"] = str(tmp_path / "elsewhere")
    (folder / "final" / "adapter_config.json").write_text(json.dumps(place))
    under = Checkpoint(folder / "final").under
    assert under is not None
    assert under.path == base
    replay(folder, tmp_path / "replayed")
    assert (folder / "final" / FILE).read_bytes() == (tmp_path / "replayed" / FILE).read_bytes()


def test_a_step_is_the_papers_over_the_adapters_tensors(model: Path, tmp_path: Path) -> None:
    folder = trained(adapted(tmp_path / "run", model, steps=1))
    journal = Journal.read(folder)
    (record,) = journal.steps
    assert np.std(record.of_members) > 0
    start = load_file(open_checkpoint(model, adapted(tmp_path / "x", model).adapter).path / FILE)
    final = load_file(folder / "final" / FILE)
    assert set(journal.header.tensors) == set(start)
    for name, tensor in start.items():
        for seed, coefficient in record.update.pairs:
            drawn = reference.normal_by_id(seed, reference.tensor_id(name), 0, tensor.size)
            tensor += np.float32(coefficient) * drawn.reshape(tensor.shape)
        np.testing.assert_allclose(final[name], tensor, rtol=0, atol=1e-5)


def test_replicas_resuming_and_replay_give_the_same_bits(model: Path, tmp_path: Path) -> None:
    one = trained(adapted(tmp_path / "one", model))
    two = trained(adapted(tmp_path / "two", model, replicas=2, steps=2, save_steps=1))
    Trainer.resume(two, steps=4, task=make_task(), monitors=[]).train()
    a, b = Journal.read(one), Journal.read(two)
    assert [substance(r) for r in a.steps] == [substance(r) for r in b.steps]
    replay(one, tmp_path / "replayed")
    final = (one / "final" / FILE).read_bytes()
    assert final == (two / "final" / FILE).read_bytes() == (tmp_path / "replayed" / FILE).read_bytes()
    assert verify(two).checkpoints == {"final": 4, "best": b.best.step if b.best else 0, "checkpoint-1": 1,
                                       "checkpoint-2": 2, "checkpoint-3": 3, "checkpoint-4": 4}  # fmt: skip
    found = evaluate_model(str(two), task=make_task())
    assert b.best is not None
    assert found["eval_reward"] == b.best.metrics["eval_reward"]


def test_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base)
    folder = trained(adapted(tmp_path / "run", base, steps=1))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1  # which no adapter is for
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for act in (
        lambda: replay(folder, tmp_path / "other"),
        lambda: Trainer.resume(folder, steps=2, task=make_task(), monitors=[]),
        lambda: verify(folder),
    ):
        with pytest.raises(EstuneError, match="the journal was written over"):
            act()
    with pytest.raises(EstuneError, match="the model under the adapter has changed since the run began"):
        evaluate_model(str(folder), task=make_task())
    replay(folder, tmp_path / "moved", model=str(model))
    assert json.loads((tmp_path / "moved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


def test_an_adapter_of_pefts_own_is_trained_on(model: Path, tmp_path: Path) -> None:
    """With what ours have not: a scale by the root of the rank, and a norm that is trained whole."""
    torch.manual_seed(1)
    options = peft.LoraConfig(r=2, use_rslora=True, target_modules=["v_proj", "up_proj"], modules_to_save=["norm"])
    given = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), options)
    given.save_pretrained(tmp_path / "given")
    folder = trained(adapted(tmp_path / "run", model, adapter={"path": str(tmp_path / "given")}, sigma=0.02))
    texts = texts_of(with_peft(model, folder / "final"), model)
    assert texts_of(load(folder), model) == texts
    final, start = load_file(folder / "final" / FILE), load_file(tmp_path / "given" / FILE)
    assert {name: t.shape for name, t in final.items()} == {name: t.shape for name, t in start.items()}
    assert not any(np.array_equal(final[name], start[name]) for name in start)
    verify(folder)


def test_what_cannot_be_is_said_in_a_line(model: Path, tmp_path: Path) -> None:
    for adapter, said in (
        (Adapter(target=["nothing"]), "no matrix of the layers is called 'nothing'; give some of: .*q_proj"),
        (Adapter(path=tmp_path), "holds no adapter_config.json with adapter_model.safetensors"),
    ):
        with pytest.raises(EstuneError, match=said):
            open_checkpoint(model, adapter)
    with pytest.raises(EstuneError, match="leave out workers_at or adapter"):
        parse({"adapter": {"rank": 4}, "workers_at": "http://127.0.0.1:8000"})
    alone = tmp_path / "alone"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(r=2)).save_pretrained(alone)
    other = save_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(EstuneError, match="PEFT cannot put it into the model"):
        TransformersEngine(open_checkpoint(other, Adapter(path=alone)).path)


def test_runs_are_merged_as_those_of_a_model_are(model: Path, tmp_path: Path) -> None:
    """Twice the same steps, each with half the weight: the steps of one."""
    one = trained(adapted(tmp_path / "one", model, steps=1))
    merged = merge([one, one], tmp_path / "merged", [0.5, 0.5])
    found, expected = (load_file(folder / "final" / FILE) for folder in (merged, one))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-6)

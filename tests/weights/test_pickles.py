"""Models whose weights are PyTorch's own files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate, pinned
from tests.models import save_model

pytestmark = pytest.mark.usefixtures("own_cache")


def test_one_file(tmp_path: Path, own_cache: Path) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=True)
    stored = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    embedding = stored["model.embed_tokens.weight"]
    torch.save({**stored, "lm_head.weight": embedding, "turned": embedding.T}, model / "pytorch_model.bin")
    found = locate(model)
    assert found.is_relative_to(own_cache)
    assert pinned(str(model)) == str(model)
    tensors = Checkpoint(found).tensors
    assert set(tensors) == {*stored, "lm_head.weight", "turned"}
    for name, tensor in stored.items():
        assert torch.equal(torch.from_numpy(tensors[name].read()), tensor.flatten()), name
    assert torch.equal(torch.from_numpy(tensors["turned"].read()), embedding.T.flatten())
    loaded = AutoModelForCausalLM.from_pretrained(found)
    assert torch.equal(loaded.lm_head.weight, embedding)
    assert {file.name for file in found.iterdir()} == {file.name for file in model.iterdir()} - {
        "pytorch_model.bin"
    } | {"model.safetensors"}
    before = (found / "model.safetensors").stat().st_mtime_ns
    assert locate(model) == found
    assert (found / "model.safetensors").stat().st_mtime_ns == before, "made again"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert json.loads((locate(model) / "config.json").read_text())["rms_norm_eps"] == 0.5


def test_several_files(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    whole = Checkpoint(model).content_hash()
    stored = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(stored)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: stored[name] for name in part}, model / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert Checkpoint(locate(model)).content_hash() == whole
    (model / "pytorch_model-2.bin").unlink()
    with pytest.raises(EstuneError, match=r"names pytorch_model-2\.bin, which is not there"):
        locate(model)


def test_safetensors_go_before(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"never looked at")
    assert locate(model) == model

"""Checkpoints: our reader and writer against the safetensors library, and what is no checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.checkpoint import Checkpoint, locate, narrow, widen
from estune.errors import EstuneError
from estune.files import replacing
from tests.models import save_model


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A checkpoint of two files with tensors of all types."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "mixed"
    folder.mkdir()
    first = {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(3, 4, 5, generator=generator).bfloat16()}
    second = {"c": torch.randn(9, generator=generator).half(), "ids": torch.arange(11), "none": torch.zeros(0)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "bfloat16"}))
    (folder / "old.bin").write_bytes(b"weights of another format")
    return folder


def test_reads_what_safetensors_wrote(mixed: Path) -> None:
    tensors = Checkpoint(mixed).tensors
    expected = {k: v for f in mixed.glob("*.safetensors") for k, v in load_file(f).items()}
    assert {n: t.shape for n, t in tensors.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    for name in "abc":
        assert torch.equal(torch.from_numpy(tensors[name].read()), expected[name].float().view(-1))
        assert torch.equal(torch.from_numpy(tensors[name].read(2, 4)), expected[name].float().view(-1)[2:6])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_reads_what_we_write(mixed: Path, tmp_path: Path, dtype: str) -> None:
    checkpoint = Checkpoint(mixed)
    new = np.linspace(-3, 3, 60, dtype=np.float32)
    checkpoint.write(tmp_path / "out", {"b": lambda: iter([new[:13], new[13:]])}, dtype)
    written = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    torch_dtype = getattr(torch, dtype)
    assert torch.equal(written["b"], torch.from_numpy(new).view(3, 4, 5).to(torch_dtype))
    old = {k: v for f in mixed.glob("*.safetensors") for k, v in load_file(f).items()}
    for name in ("a", "c", "ids", "none"):
        assert written[name].dtype == old[name].dtype
        assert torch.equal(written[name], old[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "qwen2", "dtype": dtype}
    assert not (tmp_path / "out" / "old.bin").exists()


def test_bfloat16_is_torchs() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 0x7F800000, 100_000, dtype=np.uint32).view(np.float32) * rng.choice([-1, 1], 100_000)
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(torch.from_numpy(narrow(values, "BF16")), expected.view(torch.uint16))
    assert torch.equal(torch.from_numpy(widen(narrow(values, "BF16"), "BF16")), expected.float())


def test_content_hash_ignores_files_and_sees_content(mixed: Path, tmp_path: Path) -> None:
    tensors = {k: v for f in mixed.glob("*.safetensors") for k, v in load_file(f).items()}

    def hash_of(changed: dict[str, torch.Tensor]) -> str:
        folder = tmp_path / "other"
        folder.mkdir(exist_ok=True)
        save_file({**tensors, **changed}, folder / "model.safetensors")
        return Checkpoint(folder).content_hash()

    original = Checkpoint(mixed).content_hash()
    assert hash_of({}) == original
    others = [
        hash_of({"a": -tensors["a"]}),
        hash_of({"a": tensors["a"].view(7, 5)}),
        hash_of({"d": tensors["a"].clone()}),
    ]
    assert len({original, *others}) == 4


def test_a_written_model_loads_in_transformers(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    checkpoint = Checkpoint(source)
    zeros = {n: (lambda t=t: iter([np.zeros(t.elements, np.float32)])) for n, t in checkpoint.tensors.items()}
    checkpoint.write(tmp_path / "out", zeros, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert all(not p.any() for p in model.parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    target = tmp_path / "best"
    shutil.copytree(source, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def broken() -> None:
        raise EstuneError("fingerprint")

    with pytest.raises(EstuneError, match="fingerprint"):
        Checkpoint(source).write(target, {}, "float32", broken)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "model"]


def test_replacing_a_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    for text in ("one", "two"):
        with replacing(target) as temporary:
            temporary.write_text(text)
        assert target.read_text() == text
    with pytest.raises(RuntimeError), replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("three")
        raise RuntimeError
    assert target.read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="no such directory.*tiny"):
        locate(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(EstuneError, match="is a file"):
        locate(tmp_path / "file")
    with pytest.raises(EstuneError, match="without config.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EstuneError, match="holds no .safetensors"):
        _ = Checkpoint(locate(tmp_path)).tensors
    for content in (b"", b"no header at all, only text", (2**63).to_bytes(8, "little"), b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(EstuneError, match="not a safetensors file"):
            _ = Checkpoint(tmp_path).tensors
    with pytest.raises(EstuneError, match="neither a local directory nor to be had from the hub"):
        locate("nobody/nothing")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = save_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EstuneError, match="ends inside tensor"):
        Checkpoint(file.parent).content_hash()

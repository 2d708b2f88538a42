"""Checkpoints: our reader and writer against the safetensors library, and what is no checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.errors import EstuneError
from estune.files import replacing
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import INDEX, locate
from estune.weights.tensors import narrow, widen
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
    files = {f"model-0000{n}-of-00002.safetensors": names for n, names in ((1, first), (2, second))}
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
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
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == json.loads((mixed / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())


def test_the_type_of_tensors_is_that_of_most_elements(mixed: Path) -> None:
    types = [Checkpoint(mixed).type_of(names) for names in ("a", "ab", "ac", "c", ["ids", "c"])]
    assert types == ["float32", "bfloat16", "float32", "float16", None]


def test_bfloat16_is_torchs() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 0x7F800000, 100_000, dtype=np.uint32).view(np.float32) * rng.choice([-1, 1], 100_000)
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert torch.equal(torch.from_numpy(narrow(values, "BF16")), expected.view(torch.uint16))
    assert torch.equal(torch.from_numpy(widen(narrow(values, "BF16"))), expected.float())


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


@pytest.mark.parametrize("duplicate", ["consolidated.safetensors", "model-extra.safetensors"])
@pytest.mark.parametrize("sharded", [True, False])
def test_the_weights_are_those_that_transformers_loads(tmp_path: Path, sharded: bool, duplicate: str) -> None:
    source = save_model(tmp_path / "model")
    if sharded:
        model = AutoModelForCausalLM.from_pretrained(source)
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="100KB")
        assert len(list(source.glob("*.safetensors"))) > 2
    # The same weights under other names, as Mistral's repositories hold them.
    save_file({"layers.0.wq": torch.zeros(3), "model.norm.weight": torch.zeros(48)}, source / duplicate)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    checkpoint = Checkpoint(source)
    assert set(checkpoint.tensors) == set(expected) - {"lm_head.weight"}
    doubled = {n: (lambda t=t: iter([t.read() * np.float32(2)])) for n, t in checkpoint.tensors.items()}
    checkpoint.write(tmp_path / "out", doubled, "bfloat16")
    files = {p.name for p in source.glob("*.safetensors*")} - {duplicate}
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors*")} == files
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], (2 * tensor).bfloat16()) for name, tensor in expected.items())


def test_model_safetensors_goes_before_a_leftover_index(mixed: Path) -> None:
    save_file({"a": torch.ones(2)}, mixed / "model.safetensors")
    assert Checkpoint(mixed).tensors["a"].shape == (2,)


def test_one_file_of_another_name_is_written_with_an_index(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    Checkpoint(source).write(tmp_path / "out", {}, "float32")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == [INDEX, "weights.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_that_cannot_be_told_are_refused(mixed: Path) -> None:
    good = (mixed / INDEX).read_text()
    for bad in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (mixed / INDEX).write_text(bad)
        with pytest.raises(EstuneError, match="is not an index of weights"):
            locate(mixed)
    (mixed / INDEX).write_text(good)
    (mixed / "model-00002-of-00002.safetensors").rename(mixed / "other.safetensors")
    with pytest.raises(EstuneError, match="names model-00002-of-00002.safetensors, which is not there"):
        locate(mixed)
    (mixed / INDEX).unlink()
    with pytest.raises(EstuneError, match=r"holds 2 .safetensors files, but neither model.safetensors nor .*index"):
        locate(mixed)


@pytest.mark.parametrize(("torch_type", "name"), [(torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_a_type_that_cannot_be_read_is_named(tmp_path: Path, torch_type: torch.dtype, name: str) -> None:
    save_file({"odd": torch.ones(3, dtype=torch_type), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(EstuneError, match=f"tensor odd is stored as {name}, not as one of F32.*; load the model"):
        checkpoint.tensors["odd"].read()
    checkpoint.write(tmp_path / "out", {}, "float32")  # untrained, it goes through as it is
    assert load_file(tmp_path / "out" / "model.safetensors")["odd"].dtype == torch_type


def test_what_a_model_needs_goes_along_and_nothing_else(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    needed = ["vocab.json", "merges.txt", "spiece.model", "qwen.tiktoken", "modeling_own.py", "LICENSE.txt"]
    other = ["README.md", "estune.yaml", "trainer_state.json", "training_args.bin", "optimizer.pt", "all_results.json"]
    for name in needed + other:
        (source / name).write_text("{}")
    before = {p.name for p in source.iterdir()}
    Checkpoint(source).write(tmp_path / "out", {}, "float32")
    assert {p.name for p in (tmp_path / "out").iterdir()} == before - set(other)


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


KILLED = """
import os, sys
from pathlib import Path
from estune import files
from estune.files import replacing

target, moment = Path(sys.argv[1]), sys.argv[2]
files.exchange = lambda one, other: False  # as on systems that cannot replace a directory in one call
rename = os.rename

def killing_rename(source, destination):
    rename(source, destination)
    os._exit(9)

with replacing(target) as temporary:
    temporary.mkdir()
    (temporary / "weights").write_text("new")
    if moment == "while writing":
        os._exit(9)
    os.rename = killing_rename
"""


@pytest.mark.parametrize("moment", ["while writing", "between the two renames"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_the_next_save_clears_what_a_killed_one_left(tmp_path: Path, moment: str, succeeds: bool) -> None:
    target = tmp_path / "best"
    target.mkdir()
    (target / "weights").write_text("old")
    for _ in range(2):  # every time in a process with a number of its own
        assert subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False).returncode == 9
    assert target.exists() == (moment == "while writing")
    assert len(list(tmp_path.iterdir())) == 2
    try:
        with replacing(target) as temporary:
            assert not temporary.exists()
            temporary.mkdir()
            (temporary / "weights").write_text("newer")
            if not succeeds:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert (target / "weights").read_text() == ("newer" if succeeds else "old")
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_between_the_two_renames_puts_the_old_one_back(tmp_path: Path) -> None:
    target = tmp_path / "best"
    target.mkdir()
    with pytest.raises(FileNotFoundError), replacing(target):
        pass  # nothing was written, so that there is nothing to rename
    assert list(tmp_path.iterdir()) == [target]


def test_hub_ids_with_and_without_owner_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "model")
    asked: list[dict[str, Any]] = []

    def snapshot_download(model: str, **patterns: Any) -> str:
        asked.append({"model": model, **patterns})
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert [locate(name) for name in ("gpt2", "mistralai/Mistral-7B-v0.3", "model", "tiny")][:2] == [source] * 2
    assert [a.pop("model") for a in asked] == ["gpt2", "mistralai/Mistral-7B-v0.3"]
    assert [a.pop("revision") for a in asked] == [None, None]
    needed = [p.name for p in source.iterdir()] + ["model-00001-of-00002.safetensors", INDEX]
    other = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "params.json", "README.md"]
    other += ["pytorch_model.bin", "original/model.safetensors", "onnx/config.json"]
    assert list(filter_repo_objects(needed + other, **asked[0])) == needed
    for name in ("", ".", "./none", "/none", "~/none", "a/b/c", "a b", "-x", "a/"):
        with pytest.raises(EstuneError, match="no such directory|without config.json"):
            locate(name)
    assert len(asked) == 2


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
    with pytest.raises(EstuneError, match="neither a local directory nor to be had from the hub.*tiny, smollm2$"):
        locate("tinny")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = save_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    size = file.stat().st_size
    with pytest.raises(EstuneError, match=f"was cut short: it has {size:,} bytes, by its header {size + 100:,}"):
        Checkpoint(file.parent).content_hash()

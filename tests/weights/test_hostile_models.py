"""Model folders that were made to do harm: one line, before memory or time is spent on them."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from estune.engines.loading import load_config
from estune.engines.tokenizer import load_tokenizer
from estune.errors import EstuneError
from estune.rewards.model import RewardModel
from estune.study.estimate.shapes import read_shape
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate
from estune.weights.quantized import refuse_quantized
from tests.models import save_model

MARKED = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizer
class Config(PretrainedConfig):
    model_type = "unheard-of"
class Tokenizer(PreTrainedTokenizer):
    pass
"""

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def hostile(sound: Path, tmp_path: Path) -> Path:
    """A model's folder, to be spoilt."""
    return shutil.copytree(sound, tmp_path / "model")


def one_line(work: Any, *arguments: Any) -> str:
    with pytest.raises(EstuneError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", value) for value in (-1, 0, 10**9, 2.5, "3", True)),
        *(("hidden_size", value) for value in (0, -4, 10**12)),
        *((name, 0) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")),
        *((name, 10**15) for name in ("vocab_size", "intermediate_size", "max_position_embeddings", "num_experts")),
        ("n_layer", 10**9),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
def test_sizes_that_no_model_has(hostile: Path, name: str, value: Any) -> None:
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**config, name: value}))
    for work in (load_config, read_shape):
        assert f"{next(iter(value)) if isinstance(value, dict) else name} is " in one_line(work, hostile)


@pytest.mark.parametrize(
    ("name", "text", "work"),
    [
        ("config.json", f'{{"model_type": "qwen2", "x": {DEEP}}}', load_config),
        ("config.json", f'{{"model_type": "qwen2", "x": {DEEP}}}', read_shape),
        ("config.json", '{"model_type": "qwen2", "layer_types": [3]}', load_config),
        ("config.json", "[]", load_config),
        ("tokenizer.json", DEEP, load_tokenizer),
        ("tokenizer.json", '{"model": 3}', load_tokenizer),
        ("tokenizer_config.json", f'{{"x": {DEEP}}}', load_tokenizer),
        ("special_tokens_map.json", DEEP, load_tokenizer),
    ],
    ids=range(8),
)
def test_json_that_is_too_deep_or_of_another_kind(hostile: Path, name: str, text: str, work: Any) -> None:
    (hostile / name).write_text(text)
    assert str(hostile) in one_line(work, hostile)


@pytest.mark.parametrize("work", [load_config, read_shape, load_tokenizer, lambda path: RewardModel(str(path))])
def test_its_own_code_never_runs_whatever_standard_input_says(
    hostile: Path, work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask there whether it may."""
    marker = tmp_path / "was-run"
    (hostile / "own.py").write_text(MARKED.format(marker=str(marker)))
    own = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    for name, change in (
        ("config.json", {"model_type": "unheard-of", "auto_map": own}),
        ("tokenizer_config.json", {"tokenizer_class": "Tokenizer", "auto_map": own}),
    ):
        (hostile / name).write_text(json.dumps({**json.loads((hostile / name).read_text()), **change}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    said = one_line(work, hostile)
    assert "contains custom code" in said or "if you trust them, set trust_remote_code to true" in said
    assert not marker.exists()


@pytest.mark.parametrize(
    "entry",
    [
        DEEP,
        '{"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}',
        '{"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}',
        '{"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 8]}',
        '{"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}',
        '{"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}',
        '{"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}',
        '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8.5]}',
    ],
    ids=range(8),
)
def test_headers_of_weights(hostile: Path, entry: str) -> None:
    header = f'{{"a": {entry}}}'.encode()
    (hostile / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert "is not a safetensors file" in one_line(lambda: Checkpoint(hostile).tensors)


@pytest.mark.parametrize(
    ("offsets", "size", "says"),
    [
        (((0, 8), (8, 16)), 15, "was cut short: it has .* by its header"),
        (((0, 8), (8, 16)), 17, "holds more than its header tells"),
        (((0, 8), (4, 12)), 16, "tensor b overlaps the one before"),
        (((0, 8), (0, 8)), 8, "tensor b overlaps the one before"),
        (((0, 8), (12, 20)), 20, "tensor b leaves a gap"),
        (((4, 12), (12, 20)), 20, "tensor a leaves a gap"),
        (((0, 8), (8, 15)), 15, "is not a safetensors file"),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "I32"])
def test_tensors_fill_their_file(
    hostile: Path, offsets: tuple[tuple[int, int], ...], size: int, says: str, dtype: str
) -> None:
    entries = {n: {"dtype": dtype, "shape": [2], "data_offsets": o} for n, o in zip("ab", offsets, strict=True)}
    header = json.dumps(entries).encode()
    (hostile / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    assert re.search(says, one_line(lambda: Checkpoint(hostile).tensors))


@pytest.mark.parametrize(
    "change",
    [
        *({"quantization_config": {"quant_method": kind, "bits": 4}} for kind in ("gptq", "awq", "fp8", "mxfp4")),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
    ids=lambda change: next(iter(change.values()))["quant_method"],
)
def test_quantised_weights(hostile: Path, change: dict[str, Any]) -> None:
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**config, **change}))
    kind = next(iter(change.values()))["quant_method"]
    assert f"its weights are quantised ({kind})" in one_line(lambda: refuse_quantized(Checkpoint(hostile), 4))


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.usefixtures("own_cache")
def test_a_pickle_that_runs_code(hostile: Path, tmp_path: Path) -> None:
    (hostile / "model.safetensors").unlink()
    file = hostile / "pytorch_model.bin"
    marker = tmp_path / "was-run"
    torch.save({"a": torch.ones(2), "b": Trap(marker)}, file)
    said = one_line(locate, hostile)  # and nothing of PyTorch's advice, to load it without the guard
    assert f"{file} cannot be loaded as tensors alone (it holds other things, or is damaged)" in said
    torch.save([torch.ones(2)], file)
    assert f"{file} is no table of tensors" in one_line(locate, hostile)
    file.write_bytes(file.read_bytes()[:100])
    assert f"{file} cannot be loaded" in one_line(locate, hostile)
    assert not marker.exists()


def test_an_index_that_is_too_deep(hostile: Path) -> None:
    (hostile / "model.safetensors").rename(hostile / "other.safetensors")
    (hostile / "model.safetensors.index.json").write_text(DEEP)
    assert "is not an index of weights" in one_line(lambda: Checkpoint(hostile).tensors)

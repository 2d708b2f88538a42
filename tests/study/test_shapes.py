"""Sizes from config.json alone against published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from estune.engines.loading import language_tensors
from estune.errors import EstuneError
from estune.study.estimate.shapes import read_shape
from estune.weights.checkpoint import Checkpoint
from tests.models import build_config
from tests.sizes import (
    GEMMA2_2B,
    LLAMA_8B,
    MISTRAL_7B,
    QWEN3_HALF_B,
    QWEN_7B,
    QWEN_HALF_B,
    write_config,
)
from tests.visions import save_vision

FEW_LAYERS = {**QWEN_HALF_B, "num_hidden_layers": 2}  # of which a forward takes a tenth of the time


@pytest.mark.parametrize(
    ("config", "parameters", "cache"),
    [
        # As the models' cards and safetensors indices count them; 2 x layers x heads x head_dim x 2 bytes by hand.
        (QWEN_HALF_B, 494_032_768, 2 * 24 * 2 * 64 * 2),
        (QWEN_7B, 7_615_616_512, 57_344),
        (LLAMA_8B, 8_030_261_248, 131_072),
        (MISTRAL_7B, 7_241_732_096, 131_072),
        (QWEN3_HALF_B, 596_049_920, 114_688),
        (GEMMA2_2B, 2_614_341_888, 2 * 26 * 4 * 256 * 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_sizes_are_the_published_ones(tmp_path: Path, config: dict[str, Any], parameters: int, cache: int) -> None:
    shape = read_shape(write_config(tmp_path, config))
    assert shape.parameters == shape.trained == parameters
    assert 2 * shape.cached == cache
    assert shape.dtype == config.get("torch_dtype", config.get("dtype"))


def test_which_kernels_multiply(tmp_path: Path) -> None:
    own = FEW_LAYERS | {"architectures": ["Qwen2ForCausalLM"]}
    assert read_shape(write_config(tmp_path, own)).own
    other = GEMMA2_2B | {"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 2}
    assert not read_shape(write_config(tmp_path, other)).own


def test_products_leave_embeddings_out(tmp_path: Path) -> None:
    tied = read_shape(write_config(tmp_path, FEW_LAYERS))
    layer = 896 * (896 + 2 * 128 + 896) + 3 * 896 * 4864
    assert tied.matrices == tied.active == 2 * layer
    assert tied.output == 896 * 151936
    untied = read_shape(write_config(tmp_path, {**FEW_LAYERS, "tie_word_embeddings": False}))
    assert (untied.matrices, untied.output) == (tied.matrices, tied.output)
    assert untied.parameters == tied.parameters + 896 * 151936
    assert (tied.grouped, tied.layers, tied.hidden, tied.width, tied.vocabulary) == (7, 2, 896, 4864, 151936)


def test_a_token_uses_some_experts_of_a_layer(tmp_path: Path) -> None:
    # 8 experts of 3 x 4096 x 14336, 2 of them for each token; a router; attention as in Mistral 7B. 46.7 and 12.9
    # billion are what the model's authors say, embeddings included.
    config = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = read_shape(write_config(tmp_path, config))
    assert shape.parameters == 46_702_792_704
    expert = 32 * 3 * 4096 * 14336
    assert shape.matrices - shape.active == 6 * expert
    assert shape.parameters - 6 * expert == pytest.approx(12.9e9, rel=0.002)


def test_trained_parameters_are_those_of_the_pattern(tmp_path: Path) -> None:
    folder = write_config(tmp_path, FEW_LAYERS)
    assert read_shape(folder, "*mlp*").trained == 2 * 3 * 896 * 4864
    with pytest.raises(EstuneError, match=r"'nothing\.\*'; names look like model\.embed_tokens\.weight"):
        read_shape(folder, "nothing.*")


@pytest.mark.parametrize("family", ["idefics3", "gemma3"])
def test_of_a_model_that_sees_its_language_model_is_trained(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint(save_vision(tmp_path, family))
    spoken = language_tensors(checkpoint)
    shape = read_shape(tmp_path, "auto")
    assert shape.trained == sum(checkpoint.tensors[name].elements for name in spoken) < shape.parameters
    assert not shape.slotted  # for members that add to its table of embeddings
    assert read_shape(tmp_path, "*language_model.*_proj.weight,*text_model.*_proj.weight").slotted


def test_a_model_without_attention_caches_no_keys(tmp_path: Path) -> None:
    folder = write_config(tmp_path, build_config("mamba").to_dict())
    assert read_shape(folder).cached == 0


def test_weights_of_a_type_without_kernels_are_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, {**build_config("llama").to_dict(), "dtype": "float64"})
    with pytest.raises(EstuneError, match="its weights are float64; take one whose are one of float32, bfloat16, flo"):
        read_shape(path)

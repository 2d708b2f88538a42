"""Families of models that are loaded or decoded in ways of their own; `bench.exactness.families` tries all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from estune.engines.loading import language_tensors, load_config, load_model
from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from tests.families import complete_and_compare, completed, save_family, update_and_compare
from tests.family_configs import tiny_config


@pytest.mark.parametrize("family", ["blt", "mistral4", "moshi"])
def test_completions_are_those_of_generate(family: str, tmp_path: Path) -> None:
    """Without a cache, of a class for pictures and texts, and with a window that the cache alone knows."""
    model = save_family(tmp_path, family)
    complete_and_compare(model, completed(model))


def test_a_causal_language_model_that_transformers_lists_with_those_of_pictures(tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", "mistral4")
    assert language_tensors(Checkpoint(model)) == set(update_and_compare(tmp_path, model).tensors)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("chameleon", r"model\.vqmodel\."),
        ("emu3", r"vqmodel\."),
        ("git", r"git\.(image_encoder|visual_projection)\."),
        ("idefics", r"model\.(vision_model|perceiver_resampler)\."),
        ("phi4_multimodal", r"model\.embed_tokens_extend\."),
    ],
)
def test_what_sees_is_no_part_of_the_language_model(family: str, part: str, tmp_path: Path) -> None:
    base = Checkpoint(save_family(tmp_path, family))
    model = load_model(tmp_path, "auto", torch.device("cpu"))
    spoken = {p.name for p in trained_parameters(model, base.tensors, "auto")}
    assert spoken == {name for name in base.tensors if not re.match(part, name)} != set(base.tensors)
    assert language_tensors(base) == spoken


@pytest.mark.parametrize(("nope", "refused"), [(0, False), (16, True)])
def test_heads_have_no_size_where_none_of_them_is_rotated(nope: int, refused: bool, tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3", qk_rope_head_dim=nope)
    config.head_dim = 0
    config.save_pretrained(tmp_path)
    if refused:
        with pytest.raises(EstuneError, match="head_dim is 0, where a whole number from 1 to"):
            load_config(tmp_path)
    else:
        assert load_config(tmp_path).head_dim == 0


def test_a_model_that_writes_no_tokens_one_by_one_is_refused(tmp_path: Path) -> None:
    tiny_config("diffusion_gemma").save_pretrained(tmp_path)
    with pytest.raises(EstuneError, match="model type 'diffusion_gemma' is not a causal language model"):
        load_config(tmp_path)

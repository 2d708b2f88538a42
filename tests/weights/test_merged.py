"""Tensors that transformers makes of others on loading: where their elements are found, and that families train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.merged import read_positions
from estune.weights.parameters import Parameter, trained_parameters
from estune.weights.places import check_places, put_together
from tests.families import save_family, train_and_compare, update_and_compare

# What a checkpoint's tensors are made into, each [a, b, c] and there are several: the ways of transformers' rules.
WAYS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "stacked": torch.stack,
    "side by side": lambda ts: torch.cat(ts, 2),
    "below one another": lambda ts: torch.cat(ts, 0),
    "stacked and below": lambda ts: torch.cat([torch.stack(ts[:1]), torch.stack(ts[-1:])], 2)[:, :, : len(ts[0][0])],
    "turned": lambda ts: ts[0].transpose(1, 2).contiguous(),
    "all turned, stacked": lambda ts: torch.stack([t.permute(2, 0, 1) for t in ts]),
    "interleaved": lambda ts: ts[0].reshape(2, -1, ts[0].shape[-1]).transpose(0, 1).flatten(0, 1),
    "cut": lambda ts: torch.chunk(ts[0], 2, 0)[-1],
    "flat": lambda ts: ts[0].reshape(-1, ts[0].shape[-1]),
    "single numbers": lambda ts: ts[0].reshape(2, -1).t().reshape(-1),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=20)
@given(
    shape=st.tuples(st.sampled_from([2, 4]), st.integers(1, 5), st.integers(1, 6)),
    count=st.integers(1, 3),
)
def test_elements_are_found_where_they_are_put(way: str, shape: tuple[int, int, int], count: int) -> None:
    values = torch.randn(count, *shape)
    made = WAYS[way](list(values.unbind()))
    size = math.prod(shape)
    positions = torch.stack([torch.arange(size) + i * (size + 1) for i in range(count)]).view(count, *shape).double()
    laid = read_positions(
        "made", WAYS[way](list(positions.unbind())).contiguous(), {f"{i}": size for i in range(count)}
    )

    live = made.clone(memory_format=torch.contiguous_format)
    flat = laid.lay_out(live)
    assert torch.equal(live, made)  # in whatever order its memory now is
    assert flat.data_ptr() == live.data_ptr()
    for piece in laid.pieces:
        part = piece.part
        of = values[int(piece.name)].reshape(-1)
        expected = torch.as_strided(of, (part.rows, part.width), (part.pitch, 1), of.storage_offset() + part.start)
        assert torch.equal(flat[piece.start : piece.start + part.elements].view(part.rows, part.width), expected)
    assert laid.elements == made.numel()
    if way in ("interleaved", "turned", "flat", "single numbers"):
        held: list[tuple[Parameter, Tensor]] = []
        for piece in laid.pieces:
            stretch = flat[piece.start : piece.start + piece.part.elements]
            held.append((Parameter(piece.name, stretch, (), piece.part), stretch))
        assert torch.equal(put_together(held), values[0].reshape(-1))


def test_what_is_calculated_is_refused() -> None:
    positions = torch.arange(12).double()
    for changed in (positions + 0.5, positions / 2, positions + 100, -positions):
        with pytest.raises(EstuneError, match="transformers calculates with a while loading b: it cannot be trained"):
            read_positions("b", changed.view(3, 4), {"a": 12})


FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "deepseek_v3",
    "llama4_text",
    "jamba",
    "nemotron_h",
    "kimi_linear",
    "inkling2_text",
    "lfm2_moe",
    "olmo_hybrid",
)
"""Mixtures of experts whose tensors transformers' rules treat differently; `bench.exactness.families` tries all."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_is_trained_under_its_checkpoints_names(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", family)
    assert set(update_and_compare(tmp_path, model).tensors) == set(Checkpoint(model).tensors)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"dtype": "bfloat16", "save_dtype": "bfloat16"}),
        ("olmoe", {"weights": "inplace"}),
        ("gpt_oss", {"noise": "rank1"}),  # every second row, whose columns are those of the whole
        ("qwen3_moe", {"noise": "rank4"}),
    ],
)
def test_a_run_of_a_mixture_of_experts_replays_to_the_bit(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    train_and_compare(tmp_path, save_family(tmp_path / "model", family), **changes)


def test_routers_are_left_out_by_a_pattern(tmp_path: Path) -> None:
    model = save_family(tmp_path / "model", "mixtral")
    base = Checkpoint(model)
    train_and_compare(tmp_path, model, train_parameters="*.block_sparse_moe.*, !*.gate.weight")
    final = Checkpoint(tmp_path / "run" / "final")
    moved = {n for n, t in final.tensors.items() if (t.stored() != base.tensors[n].stored()).any()}
    assert moved == {n for n in base.tensors if ".experts." in n}


def test_a_tensor_that_is_not_what_the_checkpoint_holds_is_told(tmp_path: Path) -> None:
    base = Checkpoint(save_family(tmp_path / "model", "mixtral"))
    loaded = AutoModelForCausalLM.from_pretrained(base.path, trust_remote_code=False)
    parameters = trained_parameters(loaded, base.tensors)
    check_places(parameters, base)
    with torch.no_grad():
        loaded.model.layers[1].mlp.experts.down_proj[2, 3, 4] += 1
    with pytest.raises(
        EstuneError, match=r"model\.layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight, as transformers"
    ):
        check_places(parameters, base)

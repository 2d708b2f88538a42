"""Quantised checkpoints read as integers times scales: every bit, by each format's own definition and its library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.coded import CodedTensor
from estune.weights.grid import Grid
from estune.weights.integers import refuse_pattern
from estune.weights.packed import packs
from estune.weights.packed import settings as settings_of
from estune.weights.tensors import PACKED
from tests.quantized import (
    AWQ,
    GPTQ,
    GROUP,
    INT4,
    TORCHAO,
    TORCHAO_INT8,
    Quantised,
    awq,
    compressed,
    gptq,
    packed_as,
    quantised,
    torchao,
)

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def saved(folder: Path, tensors: Mapping[str, torch.Tensor], how: Mapping[str, Any], **others: torch.Tensor) -> Any:
    """A checkpoint of a quantised matrix and a norm; returns the matrix as it is read."""
    folder.mkdir(exist_ok=True)
    parts = {NAME.removesuffix("weight") + key: value.contiguous() for key, value in tensors.items()}
    save_file({NORM: torch.ones(4), **parts, **others}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": how}))
    return Checkpoint(folder).tensors.get(NAME)


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


FORMATS: dict[str, Any] = {
    "compressed-tensors": (INT4, 4, True, compressed),
    "compressed-tensors, 8 bits": (packed_as(8), 8, True, compressed),
    "compressed-tensors, zero points": (
        packed_as(4, symmetric=False),
        4,
        False,
        lambda q: compressed(q, symmetric=False),
    ),
    "gptq": (GPTQ, 4, True, gptq),
    "gptq, 8 bits, zero points": ({**GPTQ, "bits": 8}, 8, False, gptq),
    "gptq, second format": ({**GPTQ, "checkpoint_format": "gptq_v2"}, 4, True, lambda q: gptq(q, less=0)),
    "awq": (AWQ, 4, False, awq),
    "torchao": (TORCHAO, 4, True, torchao),
    "torchao, 8 bits": (TORCHAO_INT8, 8, True, torchao),
    "torchao, zero points": (TORCHAO, 4, False, lambda q: torchao(q, symmetric=False)),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_and_scales_are_the_files(kind: str, dtype: Any, tmp_path: Path) -> None:
    how, bits, symmetric, write = FORMATS[kind]
    q = quantised(drawn(24, 96), bits, symmetric=symmetric, dtype=dtype)
    found = saved(tmp_path, write(q), how)
    codes, scales = found.coded(0, found.elements, GROUP)
    integers = q.codes - q.zeros.repeat_interleave(GROUP, 1)
    assert found.shape == (24, 96)
    np.testing.assert_array_equal(codes, integers.flatten().numpy())
    np.testing.assert_array_equal(scales, q.scales.float().flatten().numpy())
    assert found.read().tobytes() == q.values.numpy().tobytes()
    assert b"".join(found.raw()) == q.values.numpy().tobytes()
    assert found.low <= integers.min()
    assert found.high >= integers.max()
    if symmetric:
        assert (found.low, found.high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=10)
def test_any_part_of_it(kind: str, data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    how, bits, symmetric, write = FORMATS[kind]
    rows = 8 * data.draw(st.integers(1, 4))
    columns = GROUP * data.draw(st.integers(1, 3))
    q = quantised(drawn(rows, columns, data.draw(st.integers(0, 99))), bits, symmetric=symmetric)
    found = saved(tmp_path_factory.mktemp("part"), write(q), how)
    start = data.draw(st.integers(0, found.elements - 1))
    count = data.draw(st.integers(1, found.elements - start))
    values = q.values.flatten().numpy()
    assert found.stored(start, count).tobytes() == values[start : start + count].tobytes()
    group = data.draw(st.sampled_from([16, 32]))
    start = start // group * group
    count = -(-count // group) * group
    codes, scales = found.coded(start, count, group)
    assert (codes * np.repeat(scales, group)).astype(np.float32).tobytes() == values[start : start + count].tobytes()


def test_a_scale_of_a_row_and_of_all(tmp_path: Path) -> None:
    q = quantised(drawn(8, 64), 8, 64)
    assert saved(tmp_path, compressed(q), packed_as(8)).group_size == 64
    one = Quantised(q.codes, q.zeros, torch.full_like(q.scales, 0.125), 8)
    for tensors, how in (
        ({**compressed(one), "weight_scale": torch.tensor([0.125])}, packed_as(8)),
        ({**torchao(one), "_weight_scale": torch.tensor([[0.125]])}, TORCHAO_INT8),
    ):
        assert saved(tmp_path, tensors, how).read().tobytes() == one.values.numpy().tobytes()


def test_groups_that_are_no_neighbours(tmp_path: Path) -> None:
    """GPTQ's "act order": which group a column belongs to, the file says."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    q = quantised(drawn(8, 64))
    mixed = Quantised(q.codes[:, order], q.zeros, q.scales, 4)
    found = saved(tmp_path, gptq(mixed, order), GPTQ)
    assert found.group_size == 1
    assert found.read().tobytes() == q.values[:, order].contiguous().numpy().tobytes()


def test_a_zero_point_of_zero_borrows_from_the_next(tmp_path: Path) -> None:
    """GPTQ's first format has 1 taken from whole words, so that what is below 0 is taken from the next zero point."""
    for bits in (4, 8):
        q = quantised(drawn(16, 64), bits)
        zeros = q.zeros.clone()
        zeros[::3] = 0
        zeros[1::3] = 2**bits - 1
        expected = Quantised(q.codes, zeros, q.scales, bits)
        found = saved(tmp_path, gptq(expected), {**GPTQ, "bits": bits})
        assert found.read().tobytes() == expected.values.numpy().tobytes()
        assert found.low == 1 - 2**bits


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scale", [float("nan"), float("-inf")])
def test_a_scale_that_is_no_finite_number(kind: str, scale: float, tmp_path: Path) -> None:
    how, bits, symmetric, write = FORMATS[kind]
    q = quantised(drawn(8, 64), bits, symmetric=symmetric)
    q.scales[2, 1] = scale
    found = saved(tmp_path, write(q), how)
    for read in (found.read, lambda: found.coded(0, found.elements, GROUP)):
        with pytest.raises(EstuneError, match=rf"model.safetensors: {NAME} has a scale .* quantise it again"):
            read()


def test_integers_of_more_bits_than_the_configuration_says(tmp_path: Path) -> None:
    """torchao has a byte for each, whatever its bits: the largest integer of a row is its eighth bit's here."""
    q = quantised(drawn(8, 64), 8)
    found = saved(tmp_path, torchao(q), TORCHAO)
    for read in (found.read, lambda: Grid(4, GROUP, 1).laid(found, 0, found.elements)):
        with pytest.raises(
            EstuneError, match=rf"model.safetensors: {NAME} has integers beyond -8 to 7, .* config.json"
        ):
            read()


def test_against_the_formats_own_library(tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor

    for bits, symmetric in ((4, True), (8, True), (4, False)):
        scheme = library.quantization.QuantizationScheme(
            targets=["Linear"],
            weights={"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP},
        )
        q = quantised(drawn(24, 96), bits, symmetric=symmetric, dtype=torch.float32)
        half = 2 ** (bits - 1)
        given = {"weight": q.values, "weight_scale": q.scales, "weight_zero_point": (q.zeros - half).to(torch.int8)}
        packed = Compressor.compress(given, scheme)
        found = saved(tmp_path, packed, packed_as(bits, symmetric=symmetric))
        assert found.read().tobytes() == q.values.numpy().tobytes()
        assert Compressor.decompress(packed, scheme)["weight"].numpy().tobytes() == q.values.numpy().tobytes()


@pytest.mark.parametrize(("kind", "group", "bounds"), [("int8", 64, (-128, 127)), ("int4", 32, (-8, 9))])
def test_torchao_itself(kind: str, group: int, bounds: tuple[int, int]) -> None:
    """Matrices that torchao 0.18 has quantised and saved, and what it says that they are, in float32."""
    tensors = Checkpoint(Path(__file__).parents[1] / "data" / "torchao" / kind).tensors
    found = tensors["up_proj.weight"]
    assert isinstance(found, CodedTensor)
    assert found.group_size == group
    assert (found.low, found.high) == bounds
    assert found.read().tobytes() == tensors["dequantized"].read().tobytes()


def test_what_cannot_be_read_stays_as_it_is_stored(tmp_path: Path) -> None:
    q = quantised(drawn(8, 64))
    group = {"targets": ["Linear"], "weights": {"num_bits": 4}}
    rounding = {**INT4, "config_groups": {"group_0": {**group, "input_activations": {"num_bits": 8}}}}
    turning = {**INT4, "transform_config": {"config_groups": {"v": {"type": "hadamard"}}}}
    zeros = compressed(q, symmetric=False)
    for tensors, how in (
        (compressed(q), {**INT4, "format": "float-quantized"}),
        (compressed(q), rounding),
        (compressed(q), turning),
        (compressed(q), packed_as(8)),
        (compressed(q), packed_as(4, symmetric=False)),
        (zeros, INT4),
        ({**compressed(q), "weight_shape": torch.tensor([8, 63])}, INT4),
        ({**compressed(q), "weight_g_idx": torch.zeros(64, dtype=torch.int32)}, INT4),
        ({**compressed(q), "weight_packed": compressed(q)["weight_packed"].view(torch.float32)}, INT4),
        ({**zeros, "weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}, packed_as(4, symmetric=False)),
        (gptq(q), {**GPTQ, "bits": 3}),
        ({**gptq(q), "qweight": gptq(q)["qweight"].float()}, GPTQ),
        ({**gptq(q), "qzeros": torch.zeros(2, 2, dtype=torch.int32)}, GPTQ),
        (gptq(q), {**GPTQ, "checkpoint_format": "marlin"}),
        ({**gptq(q), "g_idx": torch.full((64,), 9, dtype=torch.int32)}, GPTQ),
        (awq(q), {**AWQ, "version": "gemv"}),
        ({**awq(q), "qzeros": awq(q)["qzeros"].float()}, AWQ),
        (awq(q), {"quant_method": ["awq"]}),
        (torchao(q), {**TORCHAO, "quant_type": "int4_weight_only"}),
        (torchao(q), {**TORCHAO, "quant_type": {"default": {"_type": "Int8DynamicActivationIntxWeightConfig"}}}),
        (torchao(q), {**TORCHAO, "quant_type": {**TORCHAO_INT8["quant_type"], "lm_head": None}}),
        ({**torchao(q), "_weight_act_pre_scale": torch.ones(64)}, TORCHAO),
        ({**torchao(q), "_weight_zero_point": torch.zeros(8, 2)}, TORCHAO),
        ({**torchao(q), "_weight_scale": torch.ones(2, 8)}, TORCHAO),
        ({**torchao(q), "_weight_qdata": torchao(q)["_weight_qdata"].view(torch.uint8)}, TORCHAO),
        (compressed(q), {**INT4, "config_groups": 3}),
    ):
        assert saved(tmp_path, tensors, how) is None
        read = Checkpoint(tmp_path)
        assert read.tensors == read.stored
    assert saved(tmp_path, compressed(q), INT4, **{"lm_head.weight": torch.ones(2, dtype=torch.int8)}) is None


def test_others_are_left_alone(tmp_path: Path) -> None:
    bias = NAME.replace("weight", "bias")
    saved(tmp_path, compressed(quantised(drawn(8, 64))), INT4, **{bias: torch.ones(8)})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {NAME, NORM, bias}
    assert {name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, CodedTensor)} == {NAME}
    assert len(checkpoint.stored) == 5


def test_patterns_that_leave_no_integers(tmp_path: Path) -> None:
    """A matrix that the checkpoint does not hold as integers is none."""
    saved(tmp_path, compressed(quantised(drawn(8, 64))), INT4, **{"lm_head.weight": torch.ones(4, 64)})
    tensors = Checkpoint(tmp_path).tensors
    for pattern in ("auto", "*", "*_proj*", "*, !*norm*"):
        refuse_pattern(pattern, tensors, 4)
    refuse_pattern("lm_head*", tensors, 0)
    for pattern in ("lm_head*", "*norm*", "*, !*_proj*"):
        with pytest.raises(EstuneError, match=rf"leaves no matrix .* only those that .* like {NAME}, can be integers"):
            refuse_pattern(pattern, tensors, 4)
    with pytest.raises(EstuneError, match="no parameter's name fits the pattern 'elsewhere'"):
        refuse_pattern("elsewhere", tensors, 4)


def test_which_grids_a_checkpoint_is_on(tmp_path: Path) -> None:
    found = saved(tmp_path / "plain", gptq(quantised(drawn(8, 64))), GPTQ)
    on = {(bits, size): Grid(bits, size, 1).has(found) for bits in (4, 8) for size in (16, 32, 64)}
    assert on == {key: key[1] <= GROUP for key in on}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert not Grid(4, 32, 1).has(saved(tmp_path / "mixed", gptq(quantised(drawn(8, 64)), order), GPTQ))
    assert not Grid(4, 32, 1).has(saved(tmp_path / "awq", awq(quantised(drawn(8, 64), symmetric=False)), AWQ))


def test_scales_of_zero_become_next_to_nothing(tmp_path: Path) -> None:
    q = quantised(drawn(8, 64))
    q.scales[0, 1] = 0
    codes, scales = Grid(4, GROUP, 1).laid(saved(tmp_path, gptq(q), GPTQ), 0, 64)
    assert scales.tolist() == [q.scales[0, 0].item(), np.float32(1e-20)]
    assert not codes[GROUP:].any()
    assert codes[:GROUP].any()


def test_what_is_packed(tmp_path: Path) -> None:
    """What is trained, in layers, or already so where it is no embedding; of the rest what was so on this grid."""
    grid = Grid(4, GROUP, 1)
    tensors = compressed(quantised(drawn(8, 64))).items()
    outer = {f"{name}.{key}": value.clone() for name in ("lm_head", "model.embed_tokens") for key, value in tensors}
    found = saved(tmp_path / "base", compressed(quantised(drawn(8, 64))), INT4, **outer)
    base = Checkpoint(tmp_path / "base")
    assert packs(base.tensors["lm_head.weight"], grid, trained=True)
    for trained in (True, False):
        assert not packs(base.tensors["model.embed_tokens.weight"], grid, trained=trained)
    assert packs(found, grid, trained=False)
    assert not packs(found, Grid(4, 64, 1), trained=False)
    assert not packs(base.tensors[NORM], grid, trained=True)
    assert settings_of({NAME: found}, {NAME}, grid)["ignore"] == ["lm_head"]
    assert settings_of(base.tensors, {NAME}, grid)["ignore"] == ["model.embed_tokens"]


def test_a_packed_checkpoint_with_weights_that_are_not_is_told_apart(tmp_path: Path) -> None:
    found = saved(tmp_path / "base", compressed(quantised(drawn(8, 64))), INT4)
    base = Checkpoint(tmp_path / "base")
    grid = Grid(4, GROUP, 1)
    for dtype in (PACKED, "float32"):
        base.write(tmp_path / dtype, {NAME: found.runs}, dtype, grid=grid)
        assert base.wrote(tmp_path / dtype, [NAME], dtype, grid)
    shutil.copy(tmp_path / "float32" / "model.safetensors", tmp_path / PACKED)
    assert not base.wrote(tmp_path / PACKED, [NAME], PACKED, grid)

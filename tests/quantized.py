"""Tiny quantised checkpoints, made where a test needs them: by the formats' own definitions, or by their libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

GROUP = 32
WIDTHS: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Of models that can be quantised here: multiples of the groups and blocks."""

Quantize = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


def packed_int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """compressed-tensors' "pack-quantized": 4 bits each, eight to an int32, with a scale per group."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
    numbers = (groups / scale).round().clamp(-8, 7).view(rows, columns // 8, 8).to(torch.int64) + 8
    packed = sum(numbers[..., place] << (4 * place) for place in range(8))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale[..., 0].bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


@dataclass(frozen=True)
class Quantised:
    """A matrix `[rows, columns]` by its integers, zero points and scales, of each group one, `[rows, groups]`."""

    codes: torch.Tensor  # from 0 to 2^bits - 1, int64 `[rows, columns]`
    zeros: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def values(self) -> torch.Tensor:
        group = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (t.repeat_interleave(group, 1) for t in (self.zeros, self.scales.float()))
        return (self.codes - zeros) * scales


def quantised(
    weight: torch.Tensor, bits: int = 4, group: int = GROUP, *, symmetric: bool = True, dtype: Any = torch.float16
) -> Quantised:
    """A matrix' nearest integers; its scales are of `dtype`."""
    rows, columns = weight.shape
    groups = weight.double().view(rows, columns // group, group)
    most = 2**bits - 1
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (groups.abs().amax(-1) / (most / 2) if symmetric else (high - low) / most).clamp(min=1e-6).to(dtype)
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.double()).round().clamp(0, most)
    codes = (groups / scales.double()[..., None] + zeros[..., None]).round().clamp(0, most)
    return Quantised(codes.view(rows, columns).long(), zeros.long(), scales, bits)


def words(codes: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Integers `[rows, columns]` in int32 `[rows, columns * bits / 32]`: by `order` from the lowest bits on."""
    each = 32 // bits
    parts = codes.view(len(codes), -1, each)[..., list(order or range(each))]
    whole = sum(parts[..., place] << (bits * place) for place in range(each))
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def compressed(q: Quantised, *, symmetric: bool = True) -> dict[str, torch.Tensor]:
    """compressed-tensors' "pack-quantized"."""
    packed = {
        "weight_packed": words(q.codes, q.bits),
        "weight_scale": q.scales,
        "weight_shape": torch.tensor(q.codes.shape),
    }
    return packed if symmetric else {**packed, "weight_zero_point": words(q.zeros.T, q.bits).T.contiguous()}


def gptq(q: Quantised, order: torch.Tensor | None = None, *, less: int = 1) -> dict[str, torch.Tensor]:
    """GPTQ's first format, whose zero points are `less` by one; in `order` groups are no neighbours."""
    columns = q.codes.shape[1]
    plain = torch.arange(columns) // (columns // q.scales.shape[1])
    return {
        "qweight": words(q.codes, q.bits).T.contiguous(),
        "qzeros": words(q.zeros.T - less, q.bits),
        "scales": q.scales.T.contiguous(),
        "g_idx": (plain if order is None else plain[order]).to(torch.int32),
    }


def awq(q: Quantised) -> dict[str, torch.Tensor]:
    """AWQ's "gemm"."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(q.codes.T, 4, order),
        "qzeros": words(q.zeros.T, 4, order),
        "scales": q.scales.T.contiguous(),
    }


def torchao(q: Quantised, *, symmetric: bool = True) -> dict[str, torch.Tensor]:
    """torchao's int8, which holds fewer bits as well, as transformers saves it: a byte an integer."""
    half = 2 ** (q.bits - 1)
    stored = {"_weight_qdata": (q.codes - half).to(torch.int8), "_weight_scale": q.scales}
    return stored if symmetric else {**stored, "_weight_zero_point": (q.zeros - half).to(torch.int8)}


def blocks_fp8(weight: torch.Tensor, block: int = 64) -> dict[str, torch.Tensor]:
    """DeepSeek's fine-grained FP8: E4M3 with a scale per square block."""
    rows, columns = weight.shape
    blocks = weight.view(rows // block, block, columns // block, block)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        "weight": (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns),
        "weight_scale_inv": scale[:, 0, :, 0],
    }


def packed_as(bits: int, *, symmetric: bool = True) -> dict[str, Any]:
    """How compressed-tensors says of "pack-quantized" matrices what they are."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


INT4 = packed_as(4)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {
        "default": {
            "_type": "IntxWeightOnlyConfig",
            "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}},
        }
    },
}
TORCHAO_INT8 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [64, 64],
    "modules_to_not_convert": ["lm_head"],
}


def rewritten(base: Path, target: Path, quantize: Quantize, how: Mapping[str, Any]) -> None:
    """Write a model with its layers' projections quantised."""
    shutil.copytree(base, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            tensors |= {stem + key: value.contiguous() for key, value in quantize(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": how}))


def by_library(base: Path, target: Path, how: Any) -> None:
    """Write a model as transformers and a method's library quantise it."""
    shutil.copytree(base, target)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=how).save_pretrained(target)


def save_quantized(base: Path, target: Path, method: str) -> Path:
    """Write a model quantised by a method of these; return its directory."""
    if method == "compressed-tensors":
        rewritten(base, target, packed_int4, INT4)
    elif method == "fp8":
        rewritten(base, target, blocks_fp8, FP8)
    elif method == "bitsandbytes-8bit":
        by_library(base, target, BitsAndBytesConfig(load_in_8bit=True))
    elif method == "bitsandbytes-4bit":
        by_library(base, target, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    else:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        whole, groups = Int8WeightOnlyConfig(), IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))
        by_library(base, target, TorchAoConfig(whole if method == "torchao-8bit" else groups))
    return target

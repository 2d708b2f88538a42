"""Weights of a decoder layer as the kernels take them: projections that share an input are one matrix.

The model's parameters become views of it, each still whole, contiguous and under its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from estune.engines.cpu.products import NONE, Array, Coded
from estune.engines.integers import is_integer


class Linear(NamedTuple):
    """A projection: `x @ weight.T + bias`."""

    weight: Any  # [columns, width]: an array, or `Coded`
    bias: Array  # [columns], or empty


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, views of the model's own."""

    input_norm: Array
    qkv: Linear  # [(heads + 2 * key heads) * dim, hidden]
    query_norm: Array  # [dim], or empty
    key_norm: Array
    output: Linear  # [hidden, heads * dim]
    mlp_norm: Array
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


def are_plain(layers: Iterable[Any], dtype: torch.dtype) -> bool:
    """Whether layers' projections are matrices of a type; what an adapter adds does not count.

    They may all be integers of estune's own, but not quantised otherwise.
    """
    found = [getattr(each, "base_layer", each) for layer in layers for each in _projections(layer)]
    return all(map(is_integer, found)) or all(
        type(each) is torch.nn.Linear
        and "forward" not in vars(each)  # as compressed-tensors puts its own in its place
        and type(each.weight.data) is torch.Tensor
        and each.weight.dtype == dtype
        for each in found
    )


def _projections(layer: Any) -> tuple[Any, ...]:
    attention = layer.self_attn
    mlp = layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def fused_layer(layer: Any) -> Layer:
    """The weights of one of the model's layers, with projections of the same input moved into one tensor."""
    attention = layer.self_attn
    mlp = layer.mlp
    normed = hasattr(attention, "q_norm")
    input_norm = bits_of(layer.input_layernorm.weight)
    none = input_norm[:0]  # of the model's type, for which kernels are compiled
    return Layer(
        input_norm=input_norm,
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=bits_of(attention.q_norm.weight) if normed else none,
        key_norm=bits_of(attention.k_norm.weight) if normed else none,
        output=_joined(attention.o_proj),
        mlp_norm=bits_of(layer.post_attention_layernorm.weight),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj),
    )


def _joined(*projections: Any) -> Linear:
    """One projection made of several, whose parameters become views of it."""
    biases = [projection.bias for projection in projections]
    bias = NONE if biases[0] is None else _whole(biases)
    if is_integer(projections[0]):
        codes, scales = (_whole([getattr(p, part) for p in projections]) for part in ("codes", "scales"))
        return Linear(_coded(codes, scales, projections[0]), bias)
    return Linear(_whole([projection.weight for projection in projections]), bias)


def _whole(parts: Sequence[torch.Tensor]) -> Array:
    """One tensor made of all parts, one after another. The parts become views of it."""
    if len(parts) == 1:
        return bits_of(parts[0])
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
        part.data = view
    return bits_of(whole)


def matrix_of(layer: Any) -> Any:
    """The weight of a linear layer or an embedding, its own memory: an array, or `Coded` where it is integers."""
    return _coded(bits_of(layer.codes), bits_of(layer.scales), layer) if is_integer(layer) else bits_of(layer.weight)


def _coded(codes: Array, scales: Array, layer: Any) -> Coded:
    like = bits_of(torch.empty(0, dtype=layer.dtype))
    return Coded(codes, scales, layer.columns, like.dtype)


def bits_of(tensor: torch.Tensor) -> Array:
    """A tensor's own memory, bfloat16 as its bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

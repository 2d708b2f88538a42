"""An adapter's part of a layer's products: what PEFT's layers add, by kernels, and from the same memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from estune.engines.cpu import kernels
from estune.engines.cpu.layers import Layer, Linear, bits_of
from estune.engines.cpu.members import address
from estune.engines.cpu.products import FEWEST_SHARED, Array, Products
from estune.weights.parameters import ADAPTER

_PLAIN = re.compile(rf"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.lora_[AB]\.{ADAPTER}\.weight")


class Part(NamedTuple):
    """A projection's own: what is added to a product's columns from `first` on, `scale * (x @ a.T) @ b.T`."""

    first: int
    a: Array  # [rank, width]
    b: Array  # [columns, rank]
    scale: np.float32


class Packed(NamedTuple):
    """The parts of one product, as kernels take them."""

    a: Array  # [ranks, width], of all parts, as they share their input
    b: list[Array]  # of each part, scaled and across, as the kernel goes along columns: [rank, columns]
    first: list[int]  # the first column of each


def is_plain(model: Any) -> bool:
    """Whether a model has no adapter, or one of plain low-rank products beside its layers' projections."""
    own = [name for name, _ in model.named_parameters() if f".{ADAPTER}" in name]
    return all(_PLAIN.fullmatch(name) for name in own) and not any(
        getattr(module, "lora_variant", None) for module in model.modules()
    )


class LowRank:
    """The adapter of a model for which `is_plain`.

    Args:
        modules: the model's layers.
        layers: the same, as kernels take them.
    """

    def __init__(self, modules: Sequence[Any], layers: Sequence[Layer]) -> None:
        self._parts: dict[int, list[Part]] = {}
        self._packed: dict[int, Packed] = {}
        for module, layer in zip(modules, layers, strict=True):
            attention = module.self_attn
            mlp = module.mlp
            self._take(layer.qkv, attention.q_proj, attention.k_proj, attention.v_proj)
            self._take(layer.output, attention.o_proj)
            self._take(layer.gate_up, mlp.gate_proj, mlp.up_proj)
            self._take(layer.down, mlp.down_proj)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._parts)

    def _take(self, linear: Linear, *projections: Any) -> None:
        first = 0
        for each in projections:
            if hasattr(each, "lora_A"):
                a, b = (bits_of(part[ADAPTER].weight) for part in (each.lora_A, each.lora_B))
                part = Part(first, a, b, np.float32(each.scaling[ADAPTER]))
                self._parts.setdefault(address(linear.weight), []).append(part)
            first += each.out_features

    def pack(self) -> None:
        """Take the adapter's tensors as they are now: to be called again when they have changed."""
        self._packed = {
            at: Packed(
                np.concatenate([part.a for part in parts]),
                [np.ascontiguousarray(part.b.T) * part.scale for part in parts],
                [part.first for part in parts],
            )
            for at, parts in self._parts.items()
        }

    def add(self, x: Array, out: Array, linear: Linear, product: Products) -> None:
        """Add to a product of `x` `[tokens, width]`, `out` `[tokens, columns]`, what the packed adapter adds."""
        packed = self._packed.get(address(linear.weight)) if self._packed else None
        if packed is None:
            return
        low = product(x, packed.a)

        def add(begin: int, end: int) -> None:
            source = 0
            for b, first in zip(packed.b, packed.first, strict=True):
                kernels.add_low_rank(low[begin:end], out[begin:end], b, source, first)
                source += len(b)

        if out.size * len(packed.b[0]) < FEWEST_SHARED:
            add(0, len(out))
        else:
            product.in_parts(len(out), add)

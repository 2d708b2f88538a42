"""Integer weights in a model: linear layers that hold codes and scales, and widen them for each product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from estune.errors import EstuneError
from estune.noise.cpu_integers import values
from estune.weights.grid import Grid
from estune.weights.integers import Matrix
from estune.weights.parameters import Parameter
from estune.weights.storage import as_array


class IntegerLinear(nn.Module):
    """As `nn.Linear`, with its weight as integers on a grid, on the CPU.

    Args:
        layer: whose place it takes, and whose bias it keeps.
        grid: how the weight is integers.
    """

    def __init__(self, layer: nn.Linear, grid: Grid) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.dtype = layer.weight.dtype
        self.bias = layer.bias
        width = grid.bits * layer.in_features // 8
        codes = torch.zeros(layer.out_features, width, dtype=torch.int8 if grid.bits == 8 else torch.uint8)
        scales = torch.ones(layer.out_features, layer.in_features // grid.group_size)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T + bias`, of `[..., in_features]`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        values(self.codes.numpy().reshape(-1), self.scales.numpy().reshape(-1), as_array(weight))
        return linear(x, weight, self.bias)


def put_integers(model: nn.Module, parameters: Sequence[Parameter], grid: Grid) -> list[Matrix]:
    """Put integer layers in the place of a model's linear layers; their codes are still to be filled.

    Args:
        model: on the CPU, which is changed.
        parameters: what could be trained. Of these, matrices of linear layers become integers, but for the output
            matrix; the others stay as they are.
        grid: how they are integers.

    Raises:
        EstuneError: there is no such matrix, or groups do not divide its rows.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    by_address = {p.tensor.data_ptr(): p for p in parameters if p.rectangle is None}
    found = []
    for name, layer in list(model.named_modules()):
        parameter = by_address.get(layer.weight.data_ptr()) if type(layer) is nn.Linear and layer is not head else None
        if parameter is None:
            continue
        assert isinstance(layer, nn.Linear)
        if layer.in_features % grid.group_size:
            raise EstuneError(
                f"group_size {grid.group_size} does not divide the {layer.in_features} columns of {parameter.name}: "
                "set another group_size, or leave it out by train_parameters"
            )
        integer = IntegerLinear(layer, grid)
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, integer)
        found.append(Matrix(parameter.name, integer.codes, integer.scales, parameter.aliases))
    if not found:
        raise EstuneError("train_parameters leaves no matrix of a linear layer, and only these can be integers")
    return found


def is_integer(layer: Any) -> bool:
    """Whether a layer has integer weights."""
    return isinstance(layer, IntegerLinear)

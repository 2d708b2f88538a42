"""Integer weights in a model: layers that hold codes and scales, and widen them for each use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from estune.errors import EstuneError
from estune.noise.cpu_integers import values
from estune.weights.grid import Grid
from estune.weights.integers import Matrix
from estune.weights.parameters import Parameter
from estune.weights.storage import as_array

ROWS = 8192
"""Rows of a matrix that are widened at once: few have more, but for those of vocabularies."""


class IntegerLayer(nn.Module):
    """A layer with its weight `[rows, columns]` as integers, on the CPU.

    Args:
        codes: as the grid stores them, `[rows, columns]` or half the columns.
        scales: `[rows, groups]`.
        dtype: that the weight is widened to.
    """

    def __init__(self, codes: nn.Parameter, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.codes = codes
        self.register_buffer("scales", scales)  # no parameter: by those a model tells its type
        self.scales: Tensor
        self.columns: int

    def widened(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Some rows of the weight, in memory of their own."""
        weight = torch.empty(len(codes), self.columns, dtype=self.dtype)
        if len(codes):
            values(codes.numpy().reshape(-1), scales.numpy().reshape(-1), as_array(weight))
        return weight


class IntegerLinear(IntegerLayer):
    """As `nn.Linear`; `layer` is the one whose place it takes."""

    def __init__(self, layer: nn.Linear, codes: nn.Parameter, scales: Tensor) -> None:
        super().__init__(codes, scales, layer.weight.dtype)
        self.columns = self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, of `[..., in_features]`."""
        rows = zip(torch.split(self.codes, ROWS), torch.split(self.scales, ROWS), strict=True)
        found = [linear(x, self.widened(*part)) for part in rows]
        out = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return out if self.bias is None else out + self.bias


class IntegerEmbedding(IntegerLayer):
    """As `nn.Embedding`; `layer` is the one whose place it takes."""

    def __init__(self, layer: nn.Embedding, codes: nn.Parameter, scales: Tensor) -> None:
        super().__init__(codes, scales, layer.weight.dtype)
        self.num_embeddings = layer.num_embeddings
        self.columns = self.embedding_dim = layer.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, `[..., embedding_dim]`."""
        flat = ids.reshape(-1)
        return self.widened(self.codes[flat], self.scales[flat]).view(*ids.shape, -1)


_KINDS: dict[type[nn.Module], Any] = {nn.Linear: IntegerLinear, nn.Embedding: IntegerEmbedding}


def put_integers(model: nn.Module, parameters: Sequence[Parameter], grid: Grid) -> list[Matrix]:
    """Put integer layers in the place of a model's own; their codes are still to be filled.

    Args:
        model: on the CPU, which is changed.
        parameters: what is to be trained. Matrices of it become integers; vectors, such as norms and biases, stay as
            they are.
        grid: how weights are integers.

    Raises:
        EstuneError: there is no matrix, one is that of another kind of layer, or groups do not divide its rows.
    """
    matrices = {p.tensor.data_ptr(): p for p in parameters if p.part.pitch > 1}
    found: dict[int, Matrix] = {}
    for name, layer in list(model.named_modules()):
        kind = _KINDS.get(type(layer))
        address = 0 if kind is None else layer.weight.data_ptr()
        if kind is None or address not in matrices:
            continue
        if address not in found:
            found[address] = _matrix(matrices[address], grid)
        place, _, last = name.rpartition(".")
        matrix = found[address]
        setattr(model.get_submodule(place), last, kind(layer, matrix.codes, matrix.scales))
    if other := next((p.name for address, p in matrices.items() if address not in found), None):
        raise EstuneError(
            f"{other} is no weight of a linear layer or an embedding, as transformers loads it, and only these can be "
            "integers: leave it out by train_parameters"
        )
    if not found:
        raise EstuneError("train_parameters leaves no matrix, and only matrices can be integers")
    return list(found.values())


def _matrix(parameter: Parameter, grid: Grid) -> Matrix:
    """Room for the codes and scales of a parameter."""
    rows, columns = parameter.part.rows, parameter.part.width
    if columns % grid.group_size:
        raise EstuneError(
            f"weights_group_size {grid.group_size} does not divide the {columns} columns of {parameter.name}: set "
            "another, or leave it out by train_parameters"
        )
    codes = torch.zeros(rows, columns * grid.bits // 8, dtype=torch.int8 if grid.bits == 8 else torch.uint8)
    scales = torch.ones(rows, columns // grid.group_size)
    return Matrix(parameter.name, nn.Parameter(codes, requires_grad=False), scales, parameter.aliases)


def is_integer(layer: Any) -> bool:
    """Whether a layer has integer weights."""
    return isinstance(layer, IntegerLayer)

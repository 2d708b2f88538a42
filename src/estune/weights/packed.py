"""Checkpoints of integer weights as they are trained: integers and scales, in compressed-tensors' "pack-quantized".

Packed are matrices of layers, and an output matrix that was integers before; embeddings and other output matrices, for
which not all that load this format have a place, are stored as the values that their integers stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from estune.weights.coded import CodedTensor
from estune.weights.grid import Grid
from estune.weights.parameters import layer_of
from estune.weights.tensors import RUN_LENGTH, Array, Tensor

HEAD = "lm_head"  # which can be there without a tensor in the checkpoint


class Entry(NamedTuple):
    """A tensor to be written: its safetensors type, and its bytes, of which there are `size`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    raw: Callable[[], Iterable[bytes]]


def packs(tensor: Tensor, grid: Grid, *, trained: bool) -> bool:
    """Whether a tensor of the base checkpoint is packed: a layer's matrix, or an output matrix that was integers.

    It is trained, or was integers on this grid.
    """
    in_layer = len(tensor.shape) == 2 and layer_of(tensor.name)[0].isdigit()
    has_place = in_layer or (isinstance(tensor, CodedTensor) and tensor.name == f"{HEAD}.weight")
    return has_place and (trained or grid.has(tensor))


def packed(tensor: Tensor, runs: Callable[[], Iterator[Array]], grid: Grid) -> Iterator[Entry]:
    """What a matrix is packed into.

    Args:
        tensor: the base checkpoint's, which tells the scales.
        runs: gives its elements, of whole groups, in float32.
        grid: that they are on.
    """
    rows, columns = tensor.shape
    groups = columns // grid.group_size

    def words() -> Iterator[bytes]:
        for start, values in _placed(runs()):
            scales = grid.laid(tensor, start, values.size).scales
            yield _words(grid.codes(values, scales, grid.levels_of(tensor)), grid.bits)

    def scales() -> Iterator[bytes]:
        for start in range(0, tensor.elements, RUN_LENGTH):
            yield grid.laid(tensor, start, min(RUN_LENGTH, tensor.elements - start)).scales.tobytes()

    shape = np.array([rows, columns], "<i8").tobytes()
    size = tensor.elements * grid.bits // 8
    yield Entry(f"{tensor.name}_packed", "I32", (rows, columns * grid.bits // 32), size, words)
    yield Entry(f"{tensor.name}_scale", "F32", (rows, groups), rows * groups * 4, scales)
    yield Entry(f"{tensor.name}_shape", "I64", (2,), len(shape), lambda: [shape])


def settings(tensors: Mapping[str, Tensor], trained: Collection[str], grid: Grid) -> dict[str, Any]:
    """The `quantization_config` of a config.json, by which such a checkpoint is loaded.

    Args:
        tensors: the base checkpoint's, by name.
        trained: names of those that are.
        grid: that they are on.
    """
    left = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and not packs(tensor, grid, trained=name in trained)
    }
    head = set() if f"{HEAD}.weight" in tensors else {HEAD}
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": grid.group_size,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(left | head),
    }


def _placed(runs: Iterator[Array]) -> Iterator[tuple[int, Array]]:
    """Runs of elements, each with the position of its first."""
    start = 0
    for values in runs:
        yield start, values
        start += values.size


def _words(codes: npt.NDArray[np.int8], bits: int) -> bytes:
    """Integers with half of the range added, the first in the lowest bits of a word."""
    raised = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return (raised if bits == 8 else raised[::2] | (raised[1::2] << np.uint8(4))).tobytes()

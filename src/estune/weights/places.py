"""What parameters hold of a checkpoint's tensors: read in stretches, put together again, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter, Rectangle
from estune.weights.rebuild import in_order
from estune.weights.split import SplitBase, whole
from estune.weights.storage import as_array, flat, type_name
from estune.weights.tensors import DTYPES, RUN_LENGTH, convert
from estune.weights.trained import Array

if TYPE_CHECKING:
    from torch import Tensor


def stretches(read: Callable[[int, int], Array], part: Rectangle) -> Iterator[tuple[int, int, Callable[[], Array]]]:
    """A rectangle in flat stretches of some `RUN_LENGTH` elements.

    Args:
        read: gives the elements of the checkpoint's tensor from a position on, so many of them.
        part: the rectangle.

    Returns:
        Of each its first element in the rectangle, its end, and what reads it.
    """
    if part.layout is None:
        for first in range(0, part.elements, RUN_LENGTH):
            count = min(RUN_LENGTH, part.elements - first)
            yield first, first + count, partial(read, part.start + first, count)
        return
    block = max(1, RUN_LENGTH // part.pitch)
    for row in range(0, part.rows, block):
        count = min(block, part.rows - row)
        yield row * part.width, (row + count) * part.width, partial(_columns, read, part, row, count)


def check_places(parameters: Sequence[Parameter], checkpoint: Checkpoint) -> None:
    """Check that live weights which are parts of the checkpoint's tensors are what the checkpoint holds there.

    Only those are read. It proves the map that they were found by.

    Args:
        parameters: as loaded, in any type.
        checkpoint: that they were loaded from.

    Raises:
        EstuneError: some are not.
    """
    pieces = [
        (p, *stretch)
        for p in parameters
        if p.rectangle is not None
        for stretch in stretches(checkpoint.tensors[p.name].stored, p.rectangle)
    ]

    def same(piece: tuple[Parameter, int, int, Callable[[], Array]]) -> bool:
        parameter, first, end, read = piece
        live = flat(parameter.tensor)[first:end]
        stored = convert(read(), DTYPES[type_name(live.dtype)])
        return as_array(live.cpu()).tobytes() == stored.tobytes()

    for (parameter, *_), equal in zip(pieces, in_order(same, pieces), strict=True):
        if not equal:
            raise EstuneError(
                f"{parameter.name}, as transformers loads it, is not what {checkpoint.path} holds: it cannot be trained"
            )


def put_together(parts: Sequence[tuple[Parameter, Tensor | SplitBase]]) -> Tensor | SplitBase:
    """A whole tensor of a checkpoint, `[elements]`, of the parameters that it is held in, each with its elements."""
    (first, elements), *others = parts
    if not others and first.part.layout is None:
        return elements
    held = [(p.part, whole(elements)) for p, elements in parts]
    found = held[0][1].new_empty(sum(len(values) for _, values in held))
    for part, values in held:
        target = found.as_strided((part.rows, part.width), (part.pitch, 1), part.start)
        target.copy_(values.view(part.rows, part.width))
    return found


def _columns(read: Callable[[int, int], Array], part: Rectangle, row: int, count: int) -> Array:
    """A rectangle's elements in `count` of its rows, from `row` on, flat."""
    between = read(part.start + row * part.pitch, (count - 1) * part.pitch + part.width)
    item = between.itemsize
    return np.lib.stride_tricks.as_strided(between, (count, part.width), (part.pitch * item, item)).reshape(-1)

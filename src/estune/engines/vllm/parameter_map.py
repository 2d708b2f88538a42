"""Which part of which checkpoint tensor each tensor of an engine holds: fused, padded, replicated and sharded ones.

An engine's own loader knows, for every architecture and any sharding. So the loader draws the map: it is given tensors
of the checkpoint's shapes whose elements tell, digit by digit, from which tensor, row and column they come, and the map
is read from what then stands in the engine's tensors. Digits are 1 to 256, which every type of weights holds exactly. A
map describes rectangles. Whether it describes everything, the caller finds out by loading the checkpoint through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from estune.errors import EstuneError
from estune.weights.parameters import Rectangle

BASE = 256
Shapes = Mapping[str, tuple[int, ...]]
Load = Callable[[Iterator[tuple[str, Tensor]]], object]
"""Loads (checkpoint name, tensor) pairs into an engine's tensors."""
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of an engine's tensor, from `row` on, and the part of the checkpoint tensor `name` that they hold."""

    tensor: str
    row: int
    name: str
    part: Rectangle


def by_rows(tensor: Tensor) -> Tensor:
    """A tensor of any shape as `[rows, columns]`: the last dimension counts columns, a single one rows."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.view(-1, 1)


def draw_map(tensors: Mapping[str, Tensor], shapes: Shapes, load: Load) -> list[Place]:
    """The places that a checkpoint's tensors are loaded to. Afterwards these hold digits, and padding is as it was.

    Args:
        tensors: the engine's tensors by name, contiguous, of any shapes.
        shapes: those of the checkpoint's tensors.
        load: the engine's loader.

    Raises:
        EstuneError: the loader refuses such tensors, or changes what it loads.
    """
    names = list(shapes)
    sizes = {name: (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
             for name, shape in shapes.items()}  # fmt: skip
    numbers = {name: index for index, name in enumerate(names)}
    like = next(iter(tensors.values()))

    def digits(kind: str, digit: int, *, mirrored: bool = False) -> dict[str, Integers]:
        """The first column of each of the engine's tensors, `[rows]`, after loading one digit of this kind."""

        def made() -> Iterator[tuple[str, Tensor]]:
            for name in names:
                yield name, _telling(kind, digit, numbers[name], shapes[name], sizes[name], like, mirrored=mirrored)

        try:
            load(made())
        except (RuntimeError, ValueError, AssertionError, KeyError, TypeError, IndexError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise EstuneError(
                f"the engine's loader does not take plain tensors for this model ({why}): such layouts cannot be "
                "trained; use engine=transformers"
            ) from error
        return {name: by_rows(t)[:, 0].double().nan_to_num().long().cpu().numpy() for name, t in tensors.items()}

    # 1. Load a digit d, then its mirror image BASE + 1 - d: the two add up where something is loaded. Where they do not
    # and yet differ, the loader does arithmetic on what it loads. Where nothing differs, there is padding.
    first = digits("tensor", 0)
    second = digits("tensor", 0, mirrored=True)
    loaded = {name: first[name] + second[name] == BASE + 1 for name in tensors}
    for name, held in loaded.items():
        if np.any((first[name] != second[name]) & ~held):
            raise EstuneError(
                f"the engine changes {name} while loading it: such weights cannot be trained; use engine=transformers"
            )

    # 2. Read off from which tensor, row and column each of the engine's rows comes: one digit of them at a time.
    def number(kind: str, most: int) -> dict[str, Integers]:
        """The numbers of this kind, all below `most`, that each tensor's rows tell: `[rows]` by tensor."""
        total = {name: np.zeros(len(held), np.int64) for name, held in loaded.items()}
        for digit in range(_places(most)):
            for name, found in digits(kind, digit).items():
                total[name] += (found - 1) * BASE**digit
        return total

    tensor = number("tensor", len(names))
    row = number("row", max(r for r, _ in sizes.values()))
    column = number("column", max(c for _, c in sizes.values()))
    # 3. Take rows together that follow one another in the engine's tensor and in the checkpoint's.
    return [
        place
        for name, live in tensors.items()
        for place in _rectangles(name, live, loaded[name], tensor[name], row[name], column[name], names, sizes)
    ]


def _telling(
    kind: str, digit: int, number: int, shape: tuple[int, ...], size: tuple[int, int], like: Tensor, *, mirrored: bool
) -> Tensor:
    """A tensor of a checkpoint's shape in which each element is one digit of its tensor's number, row or column.

    It takes no more memory than one row or one column.
    """
    rows, columns = size
    if kind == "tensor":
        values = torch.tensor([number])
        view = [1] * len(shape)
    elif kind == "row":
        values = torch.arange(rows)
        view = [*shape[:-1], 1] if len(shape) > 1 else list(shape)
    else:
        values, view = (torch.arange(columns), [1] * (len(shape) - 1) + [columns]) if len(shape) > 1 else (
            torch.zeros(1, dtype=torch.int64), [1] * len(shape))  # fmt: skip
    told: Tensor = values // BASE**digit % BASE + 1
    told = BASE + 1 - told if mirrored else told
    return told.to(like.device, like.dtype).view(view).expand(shape)


def _places(numbers: int) -> int:
    """How many digits tell `numbers` numbers apart."""
    places = 1
    while BASE**places < numbers:
        places += 1
    return places


def _rectangles(
    live: str,
    tensor: Tensor,
    loaded: npt.NDArray[np.bool_],
    number: Integers,
    row: Integers,
    column: Integers,
    names: Sequence[str],
    sizes: Mapping[str, tuple[int, int]],
) -> Iterator[Place]:
    """One tensor's rows, taken together as far as they follow one another in the checkpoint."""
    width = by_rows(tensor).shape[1]
    where = np.flatnonzero(loaded)
    if not len(where):
        return
    follows = np.diff(where) == 1
    for values, step in ((number, 0), (row, 1), (column, 0)):
        follows &= np.diff(values[where]) == step
    for block in np.split(where, np.flatnonzero(~follows) + 1):
        first = int(block[0])
        name = names[number[first]] if number[first] < len(names) else ""
        rows, pitch = sizes.get(name, (0, 0))
        part = Rectangle(int(row[first]), int(column[first]), len(block), width, pitch)
        if part.row + part.rows > rows or part.column + width > pitch:
            raise EstuneError(
                f"the engine's tensor {live} is not made of rows of {name or 'the checkpoint'}: such layouts cannot "
                "be trained; use engine=transformers"
            )
        yield Place(live, first, name, part)


def count_once(maps: Sequence[Sequence[Place]], shapes: Shapes) -> list[list[bool]]:
    """Whether each place of each process counts: of replicated places only the first does.

    Raises:
        EstuneError: a tensor is held in part only, or in parts that overlap.
    """
    seen: dict[str, list[Rectangle]] = {}
    counted: list[list[bool]] = []
    for places in maps:
        flags = []
        for place in places:
            parts = seen.setdefault(place.name, [])
            flags.append(place.part not in parts)
            if flags[-1]:
                parts.append(place.part)
        counted.append(flags)
    for name, parts in seen.items():
        held = sum(part.elements for part in parts)
        elements = math.prod(shapes[name])
        if held != elements or _overlap(parts):
            raise EstuneError(
                f"of {elements} elements of {name} the engine holds {held}, in {len(parts)} parts: such layouts cannot "
                "be trained; use engine=transformers"
            )
    return counted


def _overlap(parts: Sequence[Rectangle]) -> bool:
    ordered = sorted(parts, key=lambda part: part.row)
    for i, a in enumerate(ordered):
        for b in ordered[i + 1 :]:
            if b.row >= a.row + a.rows:
                break
            if a.column < b.column + b.width and b.column < a.column + a.width:
                return True
    return False


def tied_names(places: Sequence[Place], shapes: Shapes, config: Any) -> dict[str, list[str]]:
    """Names of tensors that the checkpoint holds again because they are tied, by the name that the engine loads.

    Args:
        places: what all processes hold.
        shapes: those of the checkpoint's tensors.
        config: the model's text config.
    """
    loaded = {place.name for place in places}
    table = (config.vocab_size, config.hidden_size)
    embeddings = [name for name in shapes if name in loaded and shapes[name] == table]
    others = [name for name in shapes if name not in loaded and shapes[name] == table]
    if not getattr(config, "tie_word_embeddings", False) or len(embeddings) != 1:
        return {}
    return {embeddings[0]: others}

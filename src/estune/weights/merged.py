"""Checkpoint tensors that transformers makes others of when it loads them: experts merged, matrices cut or turned.

transformers' own loader draws the map (`transformers.conversion_mapping` holds its rules). It is given tensors of the
checkpoint's shapes in which each element tells its own position, in float64, which counts to 2^53; where these then
stand in the model's tensors is where the checkpoint's elements lie. One group of tensors that belong together is loaded
at a time, and what was found of a layer holds for all layers of the same shapes, so that it costs about as much memory
as the largest merged tensor takes in float64, three times.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError
from estune.weights.parameters import Rectangle

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Integers = npt.NDArray[np.int64]
SCANNED = 1 << 24  # positions compared at a time
MOST_PIECES = 1 << 16  # of one tensor: more would be no order that a loader makes


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a model's tensor, and the part of a checkpoint's tensor that it holds.

    Positions count the elements of the model's tensor with its dimensions in another order, `Laid.order`.
    """

    name: str  # the checkpoint's
    start: int
    part: Rectangle


@dataclass(frozen=True, slots=True)
class Laid:
    """Of what a model's tensor is made: with its dimensions in this order, of these pieces."""

    order: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return sum(piece.part.elements for piece in self.pieces)

    def lay_out(self, tensor: Tensor) -> Tensor:
        """The tensor's elements in this order, `[elements]`: its memory, which is laid out anew if need be."""
        turned = tensor.detach().permute(self.order)
        if not turned.is_contiguous():
            turned = turned.contiguous()
            tensor.data = turned.permute([self.order.index(i) for i in range(len(self.order))])
        return turned.view(-1)

    def renamed(self, names: Mapping[str, str]) -> Laid:
        """The same with other names."""
        return Laid(self.order, tuple(Piece(names[p.name], p.start, p.part) for p in self.pieces))


def merged_tensors(model: Any, groups: Mapping[str, Sequence[str]], shapes: Shapes) -> dict[str, Laid]:
    """Of what each of a model's tensors is made that transformers makes of these groups of checkpoint tensors.

    Args:
        model: a transformers model.
        groups: names of the checkpoint's tensors that are converted together, in the checkpoint's order, by the name of
            the model's tensor that transformers' rules give them.
        shapes: those of the checkpoint's tensors.

    Raises:
        EstuneError: the loader refuses such tensors, or calculates with them.
    """
    draw = _Drawing(model, shapes)
    known: dict[Any, tuple[Sequence[str], str, dict[str, Laid]]] = {}
    found: dict[str, Laid] = {}
    for target, sources in groups.items():
        kind = _unnumbered(target), tuple((_unnumbered(name), shapes[name]) for name in sources)
        if kind not in known:
            known[kind] = sources, target, draw(sources)
        alike, first, laid = known[kind]
        names = dict(zip(alike, sources, strict=True))
        found |= {_renumbered(name, first, target): of.renamed(names) for name, of in laid.items()}
    return found


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers draws no progress bars here: of a second or two they say nothing."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            enable_progress_bar()


class _Drawing:
    """Loads positions into a model without memory, by transformers' loader, and reads them off."""

    def __init__(self, model: Any, shapes: Shapes) -> None:
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._shapes = shapes
        with torch.device("meta"):
            self._ghost = type(model)(model.config).double()
        rules = get_model_conversion_mapping(self._ghost)
        self._settings = LoadStateDictConfig(dtype=torch.float64, weight_mapping=rules)

    def __call__(self, names: Sequence[str]) -> dict[str, Laid]:
        """What the model's tensors are made of that these tensors of the checkpoint are loaded to."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        sizes = {name: math.prod(self._shapes[name]) for name in names}
        told = {name: self._positions(start, name) for name, start in zip(names, _starts(sizes.values()), strict=True)}
        with no_bars():
            # transformers before 5.19 asks for a plan of tensor parallelism.
            plan = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
            info, _ = convert_and_load_state_dict_in_model(self._ghost, told, self._settings, **plan)
        problems = [*info.conversion_errors.values(), *info.error_msgs, *(str(m[0]) for m in info.mismatched_keys)]
        loaded = {name: tensor for name, tensor in self._ghost.named_parameters() if tensor.device.type != "meta"}
        if problems or not loaded:
            why = " ".join(str(problems[0]).split()) if problems else "nothing is loaded"
            raise EstuneError(f"transformers does not load {names[0]} as a plain tensor ({why}): it cannot be trained")
        found = {name: read_positions(name, tensor.detach(), sizes) for name, tensor in loaded.items()}
        for name, tensor in loaded.items():
            module, _, leaf = name.rpartition(".")
            setattr(self._ghost.get_submodule(module), leaf, type(tensor)(tensor.to("meta")))
        return found

    def _positions(self, start: int, name: str) -> Tensor:
        import torch

        shape = self._shapes[name]
        return torch.arange(start, start + math.prod(shape), dtype=torch.float64).view(shape)


def read_positions(live: str, positions: Tensor, sizes: Mapping[str, int]) -> Laid:
    """Of what a model's tensor is made whose elements tell where they come from.

    Args:
        live: the tensor's name.
        positions: float64, of the tensor's shape. Element i of the checkpoint's tensor n is i + the sizes of all
            tensors before it, each and one more, so that no two tensors follow one another.
        sizes: elements of each of the checkpoint's tensors, in order.

    Raises:
        EstuneError: these are no positions, or in no order.
    """
    names = list(sizes)
    starts = np.asarray(_starts(sizes.values()))
    order = _order(positions)
    flat = positions.permute(order).reshape(-1).numpy()
    cuts = np.concatenate(list(_breaks(flat)))
    begins = flat[cuts].astype(np.int64)
    lengths = np.diff(np.append(cuts, flat.size))
    number = np.searchsorted(starts, begins, "right") - 1
    local = begins - starts[number]
    whole = np.array_equal(begins, flat[cuts]) and np.array_equal(flat[cuts + lengths - 1], begins + lengths - 1)
    if not whole or np.any(number < 0) or np.any(local + lengths > np.asarray(list(sizes.values()))[number]):
        raise EstuneError(f"transformers calculates with {names[0]} while loading {live}: it cannot be trained")
    pieces = tuple(Piece(names[of], at, part) for of, at, part in _rectangles(cuts, number, local, lengths))
    if len(pieces) > MOST_PIECES:
        raise EstuneError(
            f"transformers spreads {names[0]} over {len(pieces):,} places of {live}: it cannot be trained"
        )
    return Laid(order, pieces)


def _starts(sizes: Iterable[int]) -> list[int]:
    """The position of each tensor's first element."""
    return list(itertools.accumulate((size + 1 for size in sizes), initial=0))[:-1]


def _order(positions: Tensor) -> tuple[int, ...]:
    """The order of dimensions in which the last one runs along the checkpoint's tensor, if one does."""
    import torch

    dims = range(positions.ndim)
    corner = positions[(0,) * positions.ndim]
    step = {d: float(torch.select(positions, d, 1)[(0,) * (positions.ndim - 1)] - corner) for d in dims
            if positions.shape[d] > 1}  # fmt: skip
    if 1.0 not in step.values() or step.get(positions.ndim - 1, 1.0) == 1.0:
        return tuple(dims)
    return tuple(sorted(dims, key=lambda d: -step.get(d, math.inf)))


def _breaks(flat: npt.NDArray[np.float64]) -> Iterator[Integers]:
    """Where positions do not follow the one before: the first element of each stretch."""
    yield np.zeros(1, np.int64)
    for first in range(0, flat.size - 1, SCANNED):
        part = flat[first : first + SCANNED + 1]
        yield np.flatnonzero(part[1:] != part[:-1] + 1) + first + 1


def _rectangles(
    starts: Integers, number: Integers, local: Integers, lengths: Integers
) -> Iterator[tuple[int, int, Rectangle]]:
    """Stretches, taken together where they are the rows of a rectangle: of each its tensor's number and its start.

    Args:
        starts: where in the model's tensor each stretch begins, `[stretches]`.
        number, local: the checkpoint tensor that it is of, and where it begins there, `[stretches]` each.
        lengths: `[stretches]`.
    """
    first = 0
    while first < len(starts):
        end = first + 1
        width = int(lengths[first])
        begin = int(local[first])
        pitch = int(local[end] - begin) if end < len(starts) and number[end] == number[first] else 0
        if pitch >= width and begin % pitch + width <= pitch:
            alike = (number[end:] == number[first]) & (lengths[end:] == width) & (np.diff(local[first:]) == pitch)
            end += int(np.argmin(alike)) if not np.all(alike) else len(alike)
        if end == first + 1:
            yield int(number[first]), int(starts[first]), Rectangle(0, begin, 1, width, begin + width)
        else:
            row, column = divmod(begin, pitch)
            yield int(number[first]), int(starts[first]), Rectangle(row, column, end - first, width, pitch)
        first = end


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _renumbered(name: str, first: str, target: str) -> str:
    """A name beside `first` as it is beside `target`, which has another layer's number at the same place."""
    change = {(i, a): b for i, (a, b) in enumerate(zip(first.split("."), target.split("."), strict=True)) if a != b}
    return ".".join(change.get((i, part), part) for i, part in enumerate(name.split(".")))

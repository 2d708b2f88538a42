"""How far two runs have moved their weights, and whether in the same direction, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.journal.replay import steps_of
from estune.weights.parameters import layer_of
from estune.weights.rebuild import Told, in_order, pieces_of, unheard
from estune.weights.tensors import widen


@dataclass(frozen=True)
class Distance:
    """Of a layer, or of all weights, after two runs, A and B. Norms are relative to that of A's base weights."""

    layer: str  # its number, or the name of a tensor outside the layers, or "all"
    between: float  # ||A - B||
    moved: tuple[float, float]  # ||A - its base||, ||B - its base||
    cosine: float  # of the angle between the two moves: 0 where they do not interfere, NaN where one has not moved


def distances(a: Journal, b: Journal, models: tuple[str | None, str | None], told: Told = unheard) -> list[Distance]:
    """Distances of two runs' weights after their last steps, by layer, and of all together in the last row.

    Args:
        a, b: the runs. They may have other base models, if these have tensors of the same names and shapes.
        models: their base models, where they lie elsewhere than the journals say.
        told: hears what share is done, 0 to 1.

    Raises:
        EstuneError: a base model is not there, or the runs train other tensors.
    """
    bases = [base_checkpoint(j.header, m or j.base_model()) for j, m in zip((a, b), models, strict=True)]
    names = list(a.header.tensors)
    shapes = [{n: base.tensors[n].shape for n in j.header.tensors} for j, base in zip((a, b), bases, strict=True)]
    if shapes[0] != shapes[1]:
        raise EstuneError(f"{a.run} and {b.run} train other tensors, or tensors of other shapes: they have no distance")
    steps = [steps_of(a), steps_of(b)]
    pieces = [(name, *piece) for name in names for piece in pieces_of(bases[0].tensors[name].elements, 1)]

    def sums(piece: tuple[str, int, int]) -> npt.NDArray[np.float64]:
        name, start, count = piece
        moves = []
        after = []
        for base, taken in zip(bases, steps, strict=True):
            tensor = base.tensors[name]
            after.append(widen(taken.rebuilt(tensor, start, count)).astype(np.float64))
            moves.append(after[-1] - tensor.read(start, count))
        norm = _dot(first := bases[0].tensors[name].read(start, count).astype(np.float64), first)
        difference = after[0] - after[1]
        one, other = moves
        return np.array([_dot(difference, difference), _dot(one, one), _dot(other, other), _dot(one, other), norm])

    found: dict[str, npt.NDArray[np.float64]] = {}
    whole = sum(count for _, _, count in pieces)
    done = 0
    for (name, _, count), part in zip(pieces, in_order(sums, pieces), strict=True):
        layer, _ = layer_of(name)
        found[layer] = found.get(layer, np.zeros(5)) + part
        done += count
        told(done / whole)
    layers = sorted(found, key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0, v))
    return [_distance(layer, found[layer]) for layer in layers] + [_distance("all", np.sum([*found.values()], axis=0))]


def _dot(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.dot(a, b))


def _distance(layer: str, sums: npt.NDArray[np.float64]) -> Distance:
    between, one, other, product, norm = sums.tolist()
    scale = 1 / math.sqrt(norm) if norm else math.inf
    cosine = product / math.sqrt(one * other) if one and other else math.nan
    return Distance(layer, math.sqrt(between) * scale, (math.sqrt(one) * scale, math.sqrt(other) * scale), cosine)

"""Members whose noise is of low rank, decoded together over the weights that they have in common.

A member's matrix is W + a b^T, so that x W^T + (x . b) a is its product: the large one is computed for all members'
rows at once, and the weights are read once for all of them (EGGROLL, arXiv 2511.16652). Of a higher rank there are as
many pairs a, b, added one after another. Vectors, such as the weights of a norm, are added up for each member.

What a row comes to depends on its member and its prompt alone, not on the members beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from estune.engines.cpu import kernels
from estune.engines.cpu.layers import Linear
from estune.engines.cpu.products import Array, Products
from estune.es.strategy import Member
from estune.noise import cpu_draw, low_rank
from estune.weights.tensors import widen

SHARED_OUT = 1 << 18
"""Elements of a product from which on threads share what members add to it."""


class Drawn(NamedTuple):
    """A tensor of the model that members perturb."""

    noise: int  # key of its noise
    shape: tuple[int, ...]
    scale: float = 1.0  # factor of its noise
    rank: int = 1  # of that, where it is a matrix


class Outer(NamedTuple):
    """What members add to a product's columns from `first` on: `a` is `[members, columns]`, `b` `[members, width]`."""

    first: int
    a: Array
    b: Array


@dataclass(frozen=True)
class Members:
    """What some members add to the weights that they have in common.

    Attributes:
        count: how many they are.
        owners: `[rows]`, the member whose weights decode each row of the cache.
        matrices: of each matrix, the table of embeddings among them, by the address of its memory.
        biases: of each bias that they perturb, by its address, `[members, columns]`.
        norms: the members' own, by the address of the common one, `[members, elements]`.
    """

    count: int
    owners: Array
    matrices: Mapping[int, Sequence[Outer]]
    biases: Mapping[int, Array]
    norms: Mapping[int, Array]

    def with_owners(self, owners: Array) -> Members:
        """The same members for other rows."""
        return replace(self, owners=owners)

    def add_embeddings(self, ids: Array, x: Array, table: Array, rows: Array) -> None:
        """Add to the embeddings `x` `[tokens, hidden]` of tokens `ids`, in cache rows `rows`, what members add."""
        for part in self.matrices[address(table)]:
            kernels.add_outer_rows(ids, x, self.owners[rows], part.a, part.b)

    def add_product(self, x: Array, out: Array, linear: Linear, rows: Array, threads: Products, first: int = 0) -> None:
        """Add to a product what members add.

        Args:
            x: `[tokens, width]`.
            out: its product, `[tokens, columns]`: all columns, or some from `first` on.
            linear: by which it was made.
            rows: the cache row of each token.
            threads: share out the columns, where there is enough to do.
            first: the first of the columns.
        """
        owners = self.owners[rows]
        for part in self.matrices[address(linear.weight)]:
            begin = max(part.first, first)
            end = min(part.first + part.a.shape[1], first + out.shape[1])
            if begin >= end:
                continue
            outer = functools.partial(_add_outer, x, out, owners, part, begin - part.first, begin - first)
            if len(x) * (end - begin) < SHARED_OUT:
                outer(0, end - begin)
            else:
                threads.in_parts(end - begin, outer)
        if linear.bias.size and (own := self.biases.get(address(linear.bias))) is not None:
            out += own[owners]

    def norm(self, common: Array) -> Array | None:
        """The members' own weights of a norm, `[members, elements]`; None where they are not perturbed."""
        return self.norms.get(address(common))


def _add_outer(x: Array, out: Array, owners: Array, part: Outer, source: int, target: int, low: int, high: int) -> None:
    """`kernels.add_outer` for columns `low` to `high - 1` of those that begin at `source` and `target`."""
    kernels.add_outer(x, out, owners, part.a, part.b, source + low, target + low, high - low)


def address(array: Array) -> int:
    """Where an array's memory begins."""
    found: int = array.__array_interface__["data"][0]
    return found


class Together:
    """Draws members of low-rank noise for a decoder.

    Args:
        linears: all matrices that it multiplies by.
        norms: the weights of its norms.
        table: its table of embeddings.
        tensors: what members perturb, by the address of its memory.
    """

    def __init__(
        self, linears: Sequence[Linear], norms: Iterable[Array], table: Array, tensors: Mapping[int, Drawn]
    ) -> None:
        matrices = [table, *(each.weight for each in linears)]
        self._matrices = {address(each): _parts(each, tensors) for each in matrices}
        biases = [(each.bias, _parts(each.bias, tensors)) for each in linears if each.bias.size]
        self._biases = {address(bias): (len(bias), parts) for bias, parts in biases if parts}
        self._norms = {address(norm): (norm, tensors[address(norm)]) for norm in norms if address(norm) in tensors}

    def of(self, members: Sequence[Member], sigma: float) -> Members:
        """What these members add, perturbed by `sigma`; of no row yet."""

        def outers(first: int, tensor: Drawn) -> list[Outer]:
            rows, columns = tensor.shape
            scales = [np.float32(member.sign * sigma * tensor.scale) for member in members]
            drawn = [low_rank.factors(m.seed, tensor.noise, columns, tensor.rank, 0, rows) for m in members]
            a = np.stack([scale * each.a for scale, each in zip(scales, drawn, strict=True)], 1)
            return [Outer(first, *pair) for pair in zip(a, np.stack([each.b for each in drawn], 1), strict=True)]

        def vector(tensor: Drawn) -> Array:
            scales = [np.float32(member.sign * sigma * tensor.scale) for member in members]
            pairs = zip(scales, members, strict=True)
            return np.stack([scale * cpu_draw.normal(m.seed, tensor.noise, 0, tensor.shape[0]) for scale, m in pairs])

        biases = {}
        for at, (size, parts) in self._biases.items():
            biases[at] = np.zeros((len(members), size), np.float32)
            for first, tensor in parts:
                biases[at][:, first : first + tensor.shape[0]] = vector(tensor)
        return Members(
            count=len(members),
            owners=np.zeros(0, np.int64),
            matrices={at: [each for part in parts for each in outers(*part)] for at, parts in self._matrices.items()},
            biases=biases,
            norms={at: widen(norm) + vector(tensor) for at, (norm, tensor) in self._norms.items()},
        )


def _parts(whole: Array, tensors: Mapping[int, Drawn]) -> list[tuple[int, Drawn]]:
    """The tensors that a matrix or a vector is made of, and the row at which each begins."""
    begin = address(whole)
    places = range(begin, begin + whole.nbytes)
    return [((at - begin) // whole.strides[0], tensor) for at, tensor in tensors.items() if at in places]

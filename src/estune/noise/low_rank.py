"""Noise of low rank: that of a matrix is a sum of outer products, each of which gives element (i, j) a[i] * b[j].

A member is a few vectors a matrix then, so that many members can be evaluated around one base without a copy of it
(EGGROLL, arXiv 2511.16652), and drawing takes next to no time. The vectors are noise of the same key as ever
(`reference.py`): of outer product k, from 0 on, `a[i]` is element k * 2^41 + i and `b[j]` element k * 2^41 + 2^40 + j,
of which a matrix of fewer rows and columns has none. `a` is divided by the root of the rank, so that a sum has the
variance of normals, 1. A vector, such as a norm's weights, has its own noise, an element each.

Every float32 operation is rounded on its own, in the order of `cpu_draw.py`, and so the bits are the same everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from estune.noise import cpu_draw
from estune.noise.compiled import jit
from estune.noise.cpu import add_change
from estune.noise.cpu_draw import CHUNK
from estune.noise.cpu_types import Weights, narrow, stored, widen
from estune.noise.reference import COLUMNS_AT, NEXT_AT, root_share

Vectors = npt.NDArray[np.float32]


class Factors(NamedTuple):
    """Of a member's noise of a matrix: `[rank, rows]`, over the root of the rank, and `[rank, columns]`."""

    a: Vectors
    b: Vectors


def factors(seed: int, tensor: int, columns: int, rank: int, first: int, rows: int) -> Factors:
    """The noise of `rows` rows of a matrix, from row `first` on.

    Args:
        seed: the member's, 64 bits.
        tensor: 64-bit key of the matrix' noise.
        columns: of the matrix; at most 2^40.
        rank: outer products that the noise is the sum of.
        first, rows: which of its rows; at most 2^40.
    """
    return Factors(*_factors(np.uint64(seed), np.uint64(tensor), columns, rank, root_share(rank), first, rows))


def perturb(
    live: Weights, base: Weights, seed: int, tensor: int, start: int, sigma: float, columns: int, rank: int
) -> None:
    """As `cpu.perturb`, over one stretch of a matrix.

    Args:
        live, base, seed, tensor, start, sigma: as `cpu.perturb` takes them.
        columns: of the matrix.
        rank: of its noise.
    """
    if base.size:
        drawn = _of_run(seed, tensor, start, base.size, columns, rank)
        _perturb(stored(live), stored(base), *drawn, start, np.float32(sigma))


def update(
    base: Weights,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    tensor: int,
    start: int,
    decay: float,
    rounding_seed: int | None,
    columns: int,
    rank: int,
) -> None:
    """As `cpu.update`, over one stretch of a matrix.

    Args:
        base, seeds, coefficients, tensor, start, decay, rounding_seed: as `cpu.update` takes them.
        columns: of the matrix.
        rank: of its noise.
    """
    if not base.size:
        return
    members = [_of_run(int(seed), tensor, start, base.size, columns, rank) for seed in seeds]
    rows = (start + base.size - 1) // columns + 1 - start // columns
    a = np.array([member.a for member in members], np.float32).reshape(len(members), rank, rows)
    b = np.array([member.b for member in members], np.float32).reshape(len(members), rank, columns)
    rounding = (np.uint64(rounding_seed or 0), rounding_seed is not None)
    _update(stored(base), a, b, coefficients, np.uint64(tensor), start, np.float32(decay), *rounding)


def _of_run(seed: int, tensor: int, start: int, count: int, columns: int, rank: int) -> Factors:
    """The noise of all rows that `count` elements from `start` on lie in."""
    first = start // columns
    return factors(seed, tensor, columns, rank, first, (start + count - 1) // columns + 1 - first)


@jit
def _factors(seed: Any, tensor: Any, columns: int, rank: int, share: Any, first: int, rows: int) -> Any:
    a = np.empty((rank, rows), np.float32)
    b = np.empty((rank, columns), np.float32)
    for k in range(rank):
        cpu_draw.fill(a[k], seed, tensor, k * NEXT_AT + first)
        cpu_draw.fill(b[k], seed, tensor, k * NEXT_AT + COLUMNS_AT)
        for i in range(rows):
            a[k, i] *= share
    return a, b


@jit
def multiply(noise: Any, a: Any, b: Any, row: int, column: int) -> None:
    """Write to `noise` that of as many elements of a row of `a` and `b`, from a column on."""
    for k in range(len(a)):
        factor = a[k, row]
        vector = b[k, column : column + noise.size]
        if k == 0:
            for i in range(noise.size):
                noise[i] = factor * vector[i]
        else:
            for i in range(noise.size):
                noise[i] += factor * vector[i]


@jit
def _perturb(live: Any, base: Any, a: Any, b: Any, start: int, sigma: Any) -> None:
    columns = b.shape[1]
    scratch = np.empty(columns, np.float32)
    done = 0
    column = start % columns
    for row in range(a.shape[1]):
        n = min(columns - column, base.size - done)
        target = live[done : done + n]
        source = base[done : done + n]
        if len(a) == 1:  # in one pass
            factor = a[0, row]
            vector = b[0, column : column + n]
            for i in range(n):
                target[i] = narrow(widen(source[i]) + sigma * (factor * vector[i]), target[i])
        else:
            noise = scratch[:n]
            multiply(noise, a, b, row, column)
            for i in range(n):
                target[i] = narrow(widen(source[i]) + sigma * noise[i], target[i])
        done += n
        column = 0


@jit
def _update(
    base: Any, a: Any, b: Any, coefficients: Any, tensor: Any, start: int, decay: Any, rounding: Any, stochastic: bool
) -> None:
    # By chunks as in `cpu.py`: the members' noise is summed up in float32, then added to the base, and rounded once.
    words = np.empty((4, CHUNK), np.uint32)
    total = np.empty(4 * CHUNK, np.float32)
    scratch = np.empty(4 * CHUNK, np.float32)
    rank = a.shape[1]
    columns = b.shape[2]
    top = start // columns
    stop = start + base.size
    for block in range(start // 4, (stop + 3) // 4, CHUNK):
        first = max(start, 4 * block)
        last = min(stop, 4 * (block + CHUNK))
        change = total[: last - first]
        change[:] = np.float32(0)
        done = 0
        while done < change.size:
            row = (first + done) // columns
            column = (first + done) % columns
            n = min(columns - column, change.size - done)
            part = change[done : done + n]
            noise = scratch[:n]
            for member in range(coefficients.size):
                c = coefficients[member]
                if rank == 1:  # in one pass
                    factor = a[member, 0, row - top]
                    vector = b[member, 0, column : column + n]
                    for i in range(n):
                        part[i] += c * (factor * vector[i])
                else:
                    multiply(noise, a[member], b[member], row - top, column)
                    for i in range(n):
                        part[i] += c * noise[i]
            done += n
        add_change(base[first - start : last - start], change, tensor, first, decay, rounding, stochastic, words)

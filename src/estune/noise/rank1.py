"""Noise of rank one: that of a matrix is an outer product, element (i, j) being a[i] * b[j].

A member is two vectors a matrix then, so that many members can be evaluated around one base without a copy of it
(EGGROLL, arXiv 2511.16652, with r = 1), and drawing takes next to no time. `a` and `b` are noise of the same key as
ever (`reference.py`): `a[i]` is element i, `b[j]` element 2^40 + j, of which a matrix of fewer rows has none. Products
have the variance of normals, 1. A vector, such as a norm's weights, has its own noise, an element each.

Every float32 operation is rounded on its own, in the order of `cpu.py`, and so the bits are the same everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from estune.noise import cpu
from estune.noise.cpu import CHUNK, Weights, add_change, jit, narrow, stored, widen
from estune.noise.reference import COLUMNS_AT

Vectors = npt.NDArray[np.float32]


class Factors(NamedTuple):
    """Of a member's noise of a matrix, or several members' with a first dimension more: `[rows]` and `[columns]`."""

    a: Vectors
    b: Vectors


def factors(seed: int, tensor: int, columns: int, first: int, rows: int) -> Factors:
    """The noise of `rows` rows of a matrix, from row `first` on.

    Args:
        seed: the member's, 64 bits.
        tensor: 64-bit key of the matrix' noise.
        columns: of the matrix.
        first, rows: which of its rows; at most 2^40.
    """
    return Factors(cpu.normal(seed, tensor, first, rows), cpu.normal(seed, tensor, COLUMNS_AT, columns))


def perturb(live: Weights, base: Weights, seed: int, tensor: int, start: int, sigma: float, columns: int) -> None:
    """As `cpu.perturb`, over one stretch of a matrix.

    Args:
        live, base, seed, tensor, start, sigma: as `cpu.perturb` takes them.
        columns: of the matrix.
    """
    if base.size:
        a, b = _of_run(seed, tensor, start, base.size, columns)
        _perturb(stored(live), stored(base), a, b, start, np.float32(sigma))


def update(
    base: Weights,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    tensor: int,
    start: int,
    decay: float,
    rounding_seed: int | None,
    columns: int,
) -> None:
    """As `cpu.update`, over one stretch of a matrix.

    Args:
        base, seeds, coefficients, tensor, start, decay, rounding_seed: as `cpu.update` takes them.
        columns: of the matrix.
    """
    if not base.size:
        return
    members = [_of_run(int(seed), tensor, start, base.size, columns) for seed in seeds]
    rows = (start + base.size - 1) // columns + 1 - start // columns
    a = np.array([member.a for member in members], np.float32).reshape(len(members), rows)
    b = np.array([member.b for member in members], np.float32).reshape(len(members), columns)
    rounding = (np.uint64(rounding_seed or 0), rounding_seed is not None)
    _update(stored(base), a, b, coefficients, np.uint64(tensor), start, np.float32(decay), *rounding)


def _of_run(seed: int, tensor: int, start: int, count: int, columns: int) -> Factors:
    """The noise of all rows that `count` elements from `start` on lie in."""
    first = start // columns
    return factors(seed, tensor, columns, first, (start + count - 1) // columns + 1 - first)


@jit
def _perturb(live: Any, base: Any, a: Any, b: Any, start: int, sigma: Any) -> None:
    done = 0
    column = start % b.size
    for row in range(a.size):
        n = min(b.size - column, base.size - done)
        target = live[done : done + n]
        source = base[done : done + n]
        noise = b[column : column + n]
        factor = a[row]
        for i in range(n):
            target[i] = narrow(widen(source[i]) + sigma * (factor * noise[i]), target[i])
        done += n
        column = 0


@jit
def _update(
    base: Any, a: Any, b: Any, coefficients: Any, tensor: Any, start: int, decay: Any, rounding: Any, stochastic: bool
) -> None:
    # By chunks as in `cpu.py`: the members' noise is summed up in float32, then added to the base, and rounded once.
    words = np.empty((4, CHUNK), np.uint32)
    total = np.empty(4 * CHUNK, np.float32)
    columns = b.shape[1]
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
            for member in range(coefficients.size):
                c = coefficients[member]
                factor = a[member, row - top]
                noise = b[member, column : column + n]
                for i in range(n):
                    part[i] += c * (factor * noise[i])
            done += n
        add_change(base[first - start : last - start], change, tensor, first, decay, rounding, stochastic, words)

"""Noise of low rank in Triton, and its passes: perturb and update. See `low_rank.py` for what it is.

A pass draws the vectors first, members by all vectors of a launch in one, and then reads them from the device's caches
while it goes over the weights: of rank one three operations an element and a member, where noise of an element's own
takes seventy instructions. Vectors that runs have in common, such as those of the columns, are drawn once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from estune.noise import gpu
from estune.noise.gpu import (
    _TYPES,
    BASE,
    LIVE,
    NOISE,
    PITCH,
    SKIP,
    START,
    WARPS,
    WIDTH,
    _by_element,
    _kernel,
    _narrow,
    _normals,
    _places,
    _pointer,
    _run,
    random_words,
)
from estune.noise.reference import COLUMNS_AT, NEXT_AT, root_share
from estune.noise.rows import Run

VECTORS = 1 << 17
"""Elements of the vectors of one launch, unless one run has more: a member's take half a MiB while a pass runs."""
DRAWN = 256  # counters that a program draws

# Columns of a table of vectors, and of what a run takes from them.
_KEY, _AT, _COUNT, _OFFSET, _FIRST = (tl.constexpr(i) for i in range(5))
_VECTOR = tl.constexpr(5)
_OF_ROW, _FACTORS = (tl.constexpr(i) for i in range(2))  # the latter are a and b of each outer product


@_kernel
def _draw(vectors, owners, seeds, out, pitch: tl.int64, COUNT: tl.constexpr):
    """Write each vector of each member, `[members, pitch]`: a program some counters of one of them."""
    vector = vectors + tl.load(owners + tl.program_id(0)).to(tl.int64) * _VECTOR
    seed = tl.load(seeds + tl.program_id(1)).to(tl.uint64, bitcast=True)
    start = tl.load(vector + _AT)
    first = (start >> 2) + (tl.program_id(0) - tl.load(vector + _FIRST)) * COUNT
    blocks = first + tl.arange(0, COUNT)
    low = (blocks & 0xFFFFFFFF).to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    normals = _normals(seed, tl.load(vector + _KEY).to(tl.uint64, bitcast=True), low, high)
    place = (blocks * 4 - start)[:, None] + tl.arange(0, 4)[None, :]
    inside = (place >= 0) & (place < tl.load(vector + _COUNT))
    mine = out + tl.program_id(1) * pitch + tl.load(vector + _OFFSET)
    tl.store(mine + place, normals, mask=inside)


@triton.jit
def _taken_by(owners, takes, RANK: tl.constexpr):
    """What this program's run takes of vectors: a row of a table."""
    return takes + tl.load(owners + tl.program_id(0)).to(tl.int64) * (_FACTORS + 2 * RANK)


@triton.jit
def _entries(run, taken, first, inside, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr):
    """Which entries of a and of b the elements of `COUNT` counters from `first` on are products of, and a's mask.

    `[COUNT, 4]`; where whole counters lie in one row, those of a and its mask are `[COUNT, 1]`.
    """
    start = tl.load(run + START)
    columns = tl.load(taken + _OF_ROW)
    counters = tl.arange(0, COUNT)
    if PITCHED:  # each row of the run lies in one of the matrix
        group = ((tl.load(run + SKIP) >> 2) + first).to(tl.int32) + counters
        groups = (tl.load(run + WIDTH) >> 2).to(tl.int32)
        down = group // groups
        column = ((start % columns) >> 2).to(tl.int32) + (group - down * groups)
        row = down.to(tl.int64) * (tl.load(run + PITCH) // columns)
    else:
        begin = first * 4 - start // columns * columns  # below 0 for what is not inside
        above = tl.maximum(begin, 0) // columns
        begin -= above * columns
        if ALIGNED:
            at = (begin >> 2).to(tl.int32) + counters
            groups = (columns >> 2).to(tl.int32)
        else:
            at = begin.to(tl.int32) + (counters * 4)[:, None] + tl.arange(0, 4)[None, :]
            groups = columns.to(tl.int32)
        down = at // groups
        column = at - down * groups
        row = above + down
    if ALIGNED:
        row = row[:, None]
        column = (column * 4)[:, None] + tl.arange(0, 4)[None, :]
        rows = tl.max(inside.to(tl.int32), 1, keep_dims=True) != 0
    else:
        rows = inside
    return row, column, rows


@triton.jit
def _noise(member, taken, row, column, rows, inside, RANK: tl.constexpr, SHARE: tl.constexpr):
    """The sum of a[i] * b[j] over a member's pairs of vectors, a times `SHARE`, `[COUNT, 4]`."""
    total = 0.0
    for k in tl.static_range(RANK):
        a = tl.load(member + tl.load(taken + _FACTORS + 2 * k) + row, mask=rows, other=0)
        b = tl.load(member + tl.multiple_of(tl.load(taken + _FACTORS + 2 * k + 1), 4) + column, mask=inside, other=0)
        product = (a if RANK == 1 else a * SHARE) * b
        total = product if k == 0 else total + product
    return total


@_kernel
def _perturb(
    table, owners, takes, drawn, sigma: tl.float32,
    LIVE_TYPE: tl.constexpr, BASE_TYPE: tl.constexpr, RANK: tl.constexpr, SHARE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    taken = _taken_by(owners, takes, RANK)
    live = _pointer(run, LIVE, LIVE_TYPE, ALIGNED)
    base = _pointer(run, BASE, BASE_TYPE, ALIGNED)
    for step in range(steps):
        _, _, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        row, column, rows = _entries(run, taken, first + step * COUNT, inside, PITCHED, ALIGNED, COUNT)
        weights = tl.load(base + place + at, mask=inside).to(tl.float32)
        perturbed = weights + _noise(drawn, taken, row, column, rows, inside, RANK, SHARE) * sigma
        tl.store(live + place + at, _narrow(perturbed, LIVE_TYPE), mask=inside)


@_kernel
def _update(
    table, owners, takes, drawn, pitch: tl.int64, coefficients, members: tl.int32, decay: tl.float32,
    rounding_seed: tl.uint64,
    STOCHASTIC: tl.constexpr, BASE_TYPE: tl.constexpr, RANK: tl.constexpr, SHARE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    taken = _taken_by(owners, takes, RANK)
    base = _pointer(run, BASE, BASE_TYPE, ALIGNED)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        row, column, rows = _entries(run, taken, first + step * COUNT, inside, PITCHED, ALIGNED, COUNT)
        total = tl.zeros((COUNT, 4), tl.float32)
        for member in range(members):
            mine = drawn + tl.multiple_of(member * pitch, 4)
            noise = _noise(mine, taken, row, column, rows, inside, RANK, SHARE)
            total += noise * tl.load(coefficients + member)
        old = tl.load(base + place + at, mask=inside).to(tl.float32)
        new = old + (old * decay + total)
        if STOCHASTIC:
            key = tl.load(run + NOISE).to(tl.uint64, bitcast=True)
            w0, w1, w2, w3 = random_words(rounding_seed, key, low, high)
            bits = new.to(tl.uint32, bitcast=True) + (_by_element(w0, w1, w2, w3) & 0xFFFF)
            new = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(base + place + at, _narrow(new, BASE_TYPE), mask=inside)


class Vectors:
    """Vectors of noise on a device, and what draws them.

    Args:
        wanted: of each its key, start and count; what is named twice is drawn once.
        device: where they are drawn.

    Attributes:
        places: of each its first element among a member's, a multiple of 4.
        size: elements of a member's vectors, a multiple of 4.
    """

    def __init__(self, wanted: Iterable[tuple[int, int, int]], device: torch.device) -> None:
        self._device = device
        self.places: dict[tuple[int, int, int], int] = {}
        self.size = 0
        for vector in wanted:
            if vector not in self.places:
                self.places[vector] = self.size
                self.size += _padded(vector[2])
        programs = np.array([triton.cdiv(start % 4 + count, 4 * DRAWN) for _, start, count in self.places])
        first = np.cumsum(programs) - programs
        table = [[*vector, place, int(f)] for (vector, place), f in zip(self.places.items(), first, strict=True)]
        owners = np.repeat(np.arange(len(table), dtype=np.int32), programs)
        self._table = torch.from_numpy(np.array(table, np.uint64).view(np.int64)).to(device)
        self._owners = torch.from_numpy(owners).to(device)

    def draw(self, seeds: torch.Tensor) -> torch.Tensor:
        """The vectors of these members, `[members, size]`; seeds are int64 (their bits), `[members]`, on the device."""
        drawn = torch.empty(len(seeds), self.size, device=self._device)
        if len(seeds):
            grid = (len(self._owners), len(seeds))
            how = {"COUNT": DRAWN, "num_warps": WARPS, "enable_fp_fusion": False}
            _draw[grid](self._table, self._owners, seeds, drawn, self.size, **how)
        return drawn

    def draw_one(self, seed: int) -> torch.Tensor:
        """The vectors of one member, `[1, size]`. Nothing waits for the device."""
        signed = (seed + 2**63) % 2**64 - 2**63  # its 64 bits
        return self.draw(torch.full((1,), signed, dtype=torch.int64, device=self._device))


class _Taken:
    """What the runs of a launch take of vectors.

    `places`, `[runs, 1 + 2 * rank]`, are the columns of each and where a and b of each outer product are.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        device = runs[0].live.device
        self.vectors = Vectors((vector for run in runs for vector in _vectors_of(run)), device)
        takes = [[run.columns, *(self.vectors.places[vector] for vector in _vectors_of(run))] for run in runs]
        self.places = torch.tensor(takes, dtype=torch.int64, device=device)


class Batch(gpu.Batch):
    """As `gpu.Batch`, of runs whose noise is of one low rank."""

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__(runs)
        rank = runs[0].rank
        self._how: dict[str, Any] = {"RANK": rank, "SHARE": float(root_share(rank))}
        self._taken = [_Taken(launch.runs) for launch in self._launches]

    def _loads(self, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
        """Neighbouring runs, of which the vectors take no more than `VECTORS` elements, as far as they can be few."""
        load: list[Run] = []
        left = VECTORS
        for run in runs:
            needed = sum(_padded(count) for _, _, count in _vectors_of(run))
            if load and needed > left:
                yield load
                load = []
                left = VECTORS
            load.append(run)
            left -= needed
        yield load

    def perturb(self, seed: int, sigma: float) -> None:
        """As `low_rank.perturb`, for all runs."""
        for launch, taken in zip(self._launches, self._taken, strict=True):
            types = {"LIVE_TYPE": _TYPES[launch.live], "BASE_TYPE": _TYPES[launch.base]}
            launch.start(_perturb, taken.places, taken.vectors.draw_one(seed), sigma, **types, **self._how)

    def update(
        self, seeds: torch.Tensor, coefficients: torch.Tensor, decay: float = 0.0, rounding_seed: int | None = None
    ) -> None:
        """As `gpu.Batch.update`, by the equations of `low_rank.update`."""
        for launch, taken in zip(self._launches, self._taken, strict=True):
            stochastic = rounding_seed is not None and launch.base == torch.bfloat16
            launch.start(
                _update,
                taken.places,
                taken.vectors.draw(seeds),
                taken.vectors.size,
                coefficients,
                len(seeds),
                decay,
                rounding_seed or 0,
                STOCHASTIC=stochastic,
                BASE_TYPE=_TYPES[launch.base],
                **self._how,
            )


def _vectors_of(run: Run) -> Iterator[tuple[int, int, int]]:
    """Key, start and count of a run's vectors: of each outer product a of the rows that it reaches, and b."""
    last = len(run.live) - 1
    if run.rows is not None:
        row, column = divmod(run.rows.skip + last, run.rows.width)
        last = row * run.rows.pitch + column
    first = run.start // run.columns
    rows = (run.start + last) // run.columns + 1 - first
    for begin in range(0, run.rank * NEXT_AT, NEXT_AT):
        yield run.noise, begin + first, rows
        yield run.noise, begin + COLUMNS_AT, run.columns


def _padded(count: int) -> int:
    return -(-count // 4) * 4

"""The noise in Triton, and the passes that use it: perturb, restore, update, fingerprint. For CUDA (and ROCm) devices.

Bit for bit the function of `reference.py`: polynomials written out, products and sums kept apart
(`enable_fp_fusion=False`), a correctly rounded square root. Noise is made in registers; no noise tensor exists. Each
thread makes the four normals of a counter and stores them side by side.

A pass over many runs is a few launches: `Batch` puts down in a table on the device where the runs lie, and each program
looks up its own there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from estune.noise import reference as ref
from estune.noise.cpu_sums import SQUARES_BLOCK, SQUARES_LANES
from estune.noise.rows import Rows, Run

BLOCK = 512  # counters that a program takes at a time; four elements each
STEPS = 8  # times that it does so, at most
WARPS = 8  # two counters a thread

# Everything below is scaled by powers of two, which costs no bit and spares products: 2m for m, r for 2r, th for th/2,
# and halves of sine and cosine. A polynomial's coefficients take up what its variable is scaled by.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(c * 2.0 ** (k - 8)) for k, c in enumerate(ref.LOG))
_S0, _S1, _S2 = (tl.constexpr(c * 4.0 ** (3 - k)) for k, c in enumerate(ref.SIN))
_C0, _C1, _C2 = (tl.constexpr(c * 2 * 4.0 ** (3 - k)) for k, c in enumerate(ref.COS))
_LN2_LOW = tl.constexpr(8 * ref.LN2_LOW)
_LN2_HIGH = tl.constexpr(-8 * ref.LN2_HIGH)
_HALF_PI = tl.constexpr(ref.HALF_PI * 2.0**-33)
_SQRT_HALF = tl.constexpr(int(np.float32(ref.SQRT_HALF).view(np.uint32)))
_M0 = tl.constexpr(ref.PHILOX_M0)
_M1 = tl.constexpr(ref.PHILOX_M1)
_W0 = tl.constexpr(ref.PHILOX_W0)
_W1 = tl.constexpr(ref.PHILOX_W1)

# Columns of a table of runs: addresses, keys, and what `Run` says.
LIVE, BASE, NOISE, KEY, START, SIZE, COUNTED, WIDTH, PITCH, SKIP, FIRST = (tl.constexpr(i) for i in range(11))
COLUMNS = tl.constexpr(11)

# Seeds change from call to call: compiling a variant for each that is 1 or a multiple of 16, or that fits into 32 bits,
# would be waste. Hence this list, and types on all scalars.
_kernel: Any = triton.jit(do_not_specialize=["seed", "members", "rounding_seed", "size"])


@triton.jit
def box_muller(a, b):
    """As `cpu.box_muller`, in registers: two normals from two words, all of one shape."""
    # u in (0, 1] times 2^24, and u = m * 2^e with m in [sqrt(0.5), sqrt(2)): what is at least sqrt(0.5) begins a new e.
    bits = ((a >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.uint32, bitcast=True)
    above = bits - _SQRT_HALF
    # An integer below 2^23 is the low bits of its sum with 2^23.
    e = ((above >> 23) + 0x4B000000).to(tl.float32, bitcast=True) - 8388632.0  # 2^23 + 24
    m = (bits - (above & 0xFF800000) + 0x00800000).to(tl.float32, bitcast=True) - 2.0
    # Cephes' logf, for the radius.
    z = m * m
    y = m * _L0 + _L1
    y = y * m + _L2
    y = y * m + _L3
    y = y * m + _L4
    y = y * m + _L5
    y = y * m + _L6
    y = y * m + _L7
    y = y * m + _L8
    y = (y * m) * z
    y = y + e * _LN2_LOW
    y = y - z
    r = tl.sqrt_rn(e * _LN2_HIGH - (m * 4.0 + y))
    # The angle: its quadrant, and Cephes' sinf and cosf within.
    t = ((b << 2) & 0xFFFFFF00) ^ 0x80000000
    th = t.to(tl.int32, bitcast=True).to(tl.float32) * _HALF_PI
    w = th * th
    s = w * _S0 + _S1
    s = s * w + _S2
    s = (s * w) * th + th
    c = w * _C0 + _C1
    c = c * w + _C2
    c = (c * w) * w - w + 0.5
    odd = (b & 0x40000000) != 0
    # The upper bit of the quadrant turns both. Not -s: Triton 3.6 subtracts from 0 there, and zero loses its sign.
    r = (r.to(tl.uint32, bitcast=True) ^ (b & 0x80000000)).to(tl.float32, bitcast=True)
    return r * tl.where(odd, s * -1.0, c), r * tl.where(odd, c, s)


@triton.jit
def random_words(seed, tensor, low, high):
    """As `cpu.random_words`: four 32-bit words for each block, given by the halves of its number, `[blocks]` each.

    Where `high` is one number for all blocks, the first two rounds take a product less for each.
    """
    seed = seed.to(tl.uint64)  # the interpreter takes a small number for an int32
    c0 = low
    c1 = high
    c2 = (tensor & 0xFFFFFFFF).to(tl.uint32)
    c3 = (tensor >> 32).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def _by_element(x0, x1, x2, x3):
    """Elements 0 to 3 of each block side by side, `[blocks, 4]`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (x0.shape[0], 4))


@triton.jit
def _normals(seed, tensor, low, high):
    w0, w1, w2, w3 = random_words(seed, tensor, low, high)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return _by_element(n0, n1, n2, n3)


@triton.jit
def _narrow(value, like: tl.constexpr):
    """float32 as `like`, to nearest, ties to even; bfloat16 by its bits, which the interpreter would cut off."""
    if like == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(like)


@triton.jit
def _run(table, owners, COUNT: tl.constexpr, STEPS: tl.constexpr, PITCHED: tl.constexpr):
    """A program's run, its first counter there, and how many times it takes `COUNT` counters from there on."""
    program = tl.program_id(0)
    run = table + tl.load(owners + program).to(tl.int64) * COLUMNS
    start = tl.load(run + START)
    size = tl.load(run + SIZE)
    begun = start >> 2
    end = (start + size + 3) >> 2
    if PITCHED:
        begun = size * 0
        end = size >> 2
    # Counted in whole blocks from the tensor's beginning: then the upper half of a counter is one number for a block.
    first = (begun & -COUNT) + (program - tl.load(run + FIRST)) * (COUNT * STEPS)
    return run, first, tl.minimum((end - first + COUNT - 1) // COUNT, STEPS).to(tl.int32)


@triton.jit
def _places(run, first, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr):
    """Halves of the numbers of `COUNT` counters from `first` on, the places of their elements in the run, and a mask.

    Places are one number for the first element, and distances of all from there, `[COUNT, 4]`, as is the mask.
    """
    start = tl.load(run + START)
    size = tl.load(run + SIZE)
    counters = tl.arange(0, COUNT)
    if PITCHED:  # rows begin with a counter and end with one
        group = ((tl.load(run + SKIP) >> 2) + first).to(tl.int32) + counters
        groups = (tl.load(run + WIDTH) >> 2).to(tl.int32)
        row = group // groups
        blocks = (start >> 2) + row.to(tl.int64) * (tl.load(run + PITCH) >> 2) + (group - row * groups)
        low = (blocks & 0xFFFFFFFF).to(tl.uint32)
        high = (blocks >> 32).to(tl.uint32)
        place = first * 4
    else:
        low = (first & 0xFFFFFFFF).to(tl.uint32) + counters.to(tl.uint32)
        high = (first >> 32).to(tl.uint32)
        place = first * 4 - start
    begin = tl.maximum(-place, 0).to(tl.int32)
    end = tl.minimum(size - place, 4 * COUNT).to(tl.int32)
    at = (counters * 4)[:, None] + tl.arange(0, 4)[None, :]
    if ALIGNED:  # whole counters are inside or are not
        place = tl.multiple_of(place, 4)
        inside = tl.broadcast_to(((counters * 4 >= begin) & (counters * 4 < end))[:, None], (COUNT, 4))
    else:
        inside = (at >= begin) & (at < end)
    return low, high, place, at, inside


@triton.jit
def _pointer(run, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(run + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, TYPE.primitive_bitwidth // 2)  # bytes of four
    return pointer


@_kernel
def _perturb(
    table, owners, seed: tl.uint64, sigma: tl.float32, LIVE_TYPE: tl.constexpr, BASE_TYPE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    live = _pointer(run, LIVE, LIVE_TYPE, ALIGNED)
    base = _pointer(run, BASE, BASE_TYPE, ALIGNED)
    noise = tl.load(run + NOISE).to(tl.uint64, bitcast=True)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        weights = tl.load(base + place + at, mask=inside).to(tl.float32)
        perturbed = weights + _normals(seed, noise, low, high) * sigma
        tl.store(live + place + at, _narrow(perturbed, LIVE_TYPE), mask=inside)


@_kernel
def _restore(
    table, owners, LIVE_TYPE: tl.constexpr, BASE_TYPE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    live = _pointer(run, LIVE, LIVE_TYPE, ALIGNED)
    base = _pointer(run, BASE, BASE_TYPE, ALIGNED)
    for step in range(steps):
        _, _, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        weights = tl.load(base + place + at, mask=inside)
        if LIVE_TYPE != BASE_TYPE:
            weights = _narrow(weights.to(tl.float32), LIVE_TYPE)
        tl.store(live + place + at, weights, mask=inside)


@_kernel
def _update(
    table, owners, seeds, coefficients, members: tl.int32, decay: tl.float32, rounding_seed: tl.uint64,
    STOCHASTIC: tl.constexpr, BASE_TYPE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    base = _pointer(run, BASE, BASE_TYPE, ALIGNED)
    noise = tl.load(run + NOISE).to(tl.uint64, bitcast=True)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        total = tl.zeros((COUNT, 4), tl.float32)
        for member in range(members):
            seed = tl.load(seeds + member).to(tl.uint64, bitcast=True)
            total += _normals(seed, noise, low, high) * tl.load(coefficients + member)
        old = tl.load(base + place + at, mask=inside).to(tl.float32)
        new = old + (old * decay + total)
        if STOCHASTIC:
            w0, w1, w2, w3 = random_words(rounding_seed, noise, low, high)
            bits = new.to(tl.uint32, bitcast=True) + (_by_element(w0, w1, w2, w3) & 0xFFFF)
            new = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(base + place + at, _narrow(new, BASE_TYPE), mask=inside)


@_kernel
def _fingerprint(
    table, owners, total, BITS_TYPE: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    base = _pointer(run, BASE, BITS_TYPE, ALIGNED)
    key = tl.load(run + KEY).to(tl.uint64, bitcast=True)
    steps *= tl.load(run + COUNTED).to(tl.int32)
    sums = tl.zeros((COUNT, 4), tl.uint64)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        bits = tl.load(base + place + at, mask=inside, other=0).to(tl.uint64)
        # Position times the constant: of the counter's first element, and of the others from there.
        four = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) * 0x78DDE6E5FD29F054
        z = key + four[:, None] + (tl.arange(0, 4).to(tl.uint64) * 0x9E3779B97F4A7C15)[None, :]
        z = (z ^ (z >> 30) ^ bits) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        sums += tl.where(inside, z ^ (z >> 31), 0)
    tl.atomic_add(total, tl.sum(tl.reshape(sums, (4 * COUNT,)).to(tl.int64, bitcast=True), 0), sem="relaxed")


@_kernel
def _squares(now, then, sums, size: tl.int64, BLOCK: tl.constexpr, LANES: tl.constexpr):
    difference = tl.zeros((LANES,), tl.float64)
    norm = tl.zeros((LANES,), tl.float64)
    for row in range(BLOCK // LANES):
        at = tl.program_id(0).to(tl.int64) * BLOCK + row * LANES + tl.arange(0, LANES)
        inside = at < size
        value = tl.load(then + at, mask=inside, other=0).to(tl.float32)
        change = tl.load(now + at, mask=inside, other=0).to(tl.float32) - value
        difference += change.to(tl.float64) * change.to(tl.float64)
        norm += value.to(tl.float64) * value.to(tl.float64)
    tl.store(sums + 2 * tl.program_id(0), _folded(difference, LANES))
    tl.store(sums + 2 * tl.program_id(0) + 1, _folded(norm, LANES))


@triton.jit
def _folded(lanes, LANES: tl.constexpr):
    """The sum of lanes, by halves. The sum of two numbers is the same however it is made."""
    for halves in tl.static_range(1, LANES.bit_length()):
        lanes = tl.sum(tl.reshape(lanes, (2, LANES >> halves)), 0)
    return tl.sum(lanes, 0)


@dataclass(frozen=True)
class Launch:
    """Runs of one kind: their table and, for each program, the number of its run, both on the device."""

    runs: Sequence[Run]
    table: torch.Tensor
    owners: torch.Tensor
    live: torch.dtype
    base: torch.dtype
    flags: dict[str, Any]

    def start(self, kernel: Any, *arguments: Any, **types: Any) -> None:
        """Have the device run a kernel on all of them."""
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        kernel[(len(self.owners),)](self.table, self.owners, *arguments, **types, **self.flags, **options)


class Batch:
    """Runs of flat tensors on one device, and the passes over all of them: a launch for each kind of run.

    Kinds differ in types, in whether a run is columns of its tensor, and in whether whole counters lie side by side in
    memory. Tensors must stay where they are. Nothing waits for the device.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        kinds: dict[tuple[torch.dtype, torch.dtype, bool, bool], list[Run]] = {}
        for run in self.runs:
            for part in _parts(run):
                if len(part.live):
                    kind = (part.live.dtype, part.base.dtype, part.rows is not None, _aligned(part))
                    kinds.setdefault(kind, []).append(part)
        self._launches = [self._launch(*kind, load) for kind, found in kinds.items() for load in self._loads(found)]

    def _loads(self, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
        """Runs of one kind in groups of a launch each: all in one."""
        yield runs

    def _launch(
        self, live: torch.dtype, base: torch.dtype, pitched: bool, aligned: bool, runs: Sequence[Run]
    ) -> Launch:
        programs = np.array([_programs(run) for run in runs])
        first = np.cumsum(programs) - programs
        table = np.array([[*_row(run), int(f)] for run, f in zip(runs, first, strict=True)], np.uint64)
        owners = np.repeat(np.arange(len(runs), dtype=np.int32), programs)
        device = runs[0].live.device
        flags = {"PITCHED": pitched, "ALIGNED": aligned, "COUNT": BLOCK, "STEPS": STEPS}
        rows = torch.from_numpy(table.view(np.int64)).to(device)
        return Launch(runs, rows, torch.from_numpy(owners).to(device), live, base, flags)

    def perturb(self, seed: int, sigma: float) -> None:
        """As `cpu.perturb`, for all runs."""
        for launch in self._launches:
            types = {"LIVE_TYPE": _TYPES[launch.live], "BASE_TYPE": _TYPES[launch.base]}
            launch.start(_perturb, seed, sigma, **types)

    def restore(self) -> None:
        """Set `live = base`, rounded to nearest, in all runs."""
        for launch in self._launches:
            launch.start(_restore, LIVE_TYPE=_TYPES[launch.live], BASE_TYPE=_TYPES[launch.base])

    def update(
        self, seeds: torch.Tensor, coefficients: torch.Tensor, decay: float = 0.0, rounding_seed: int | None = None
    ) -> None:
        """As `cpu.update`, for the bases of all runs.

        `seeds` are int64 (their bits) and `coefficients` float32, `[members]` each, both on the device.
        """
        for launch in self._launches:
            stochastic = rounding_seed is not None and launch.base == torch.bfloat16
            launch.start(
                _update,
                seeds,
                coefficients,
                seeds.numel(),
                decay,
                rounding_seed or 0,
                STOCHASTIC=stochastic,
                BASE_TYPE=_TYPES[launch.base],
            )

    def fingerprint(self, total: torch.Tensor) -> None:
        """As `cpu_sums.fingerprint`, for the bases of the runs that count; added to `total`, int64 `[1]` on the GPU."""
        for launch in self._launches:
            launch.start(_fingerprint, total, BITS_TYPE=tl.uint32 if launch.base.itemsize == 4 else tl.uint16)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _parts(run: Run) -> Iterator[Run]:
    """A run in parts for the kernels: whole, or row by row if its rows do not begin and end with a counter."""
    counted = run.rows is not None and run.rows.skip + len(run.live) < 2**33  # counters in it are 32-bit
    whole = run.rows is None or (counted and _aligned(run) and _in_rows(run))
    yield from (run,) if whole else run.stretches()


def _aligned(run: Run) -> bool:
    """Whether each counter of a run has four elements, side by side, at an address that is a multiple of their size."""
    addresses = (t.data_ptr() // t.element_size() for t in (run.live, run.base))
    return not any(n % 4 for n in (run.start, len(run.live), run.columns, *(run.rows or ()), *addresses))


def _in_rows(run: Run) -> bool:
    """Whether each row of a run that is columns of its tensor lies in one row of it, as low rank's kernels want it."""
    if run.rows is None or not run.columns:
        return True
    return run.rows.pitch % run.columns == 0 and run.start % run.columns + run.rows.width <= run.columns


def _programs(run: Run) -> int:
    """How many programs a run takes; see `_run`."""
    begun = 0 if run.rows else run.start // 4 // BLOCK * BLOCK
    end = len(run.live) // 4 if run.rows else (run.start + len(run.live) + 3) // 4
    return int(triton.cdiv(end - begun, BLOCK * STEPS))


def _row(run: Run) -> tuple[int, ...]:
    """A run's row of the table, but for its last column."""
    place = (run.noise, run.key, run.start, len(run.live), int(run.counted))
    return (run.live.data_ptr(), run.base.data_ptr(), *place, *(run.rows or Rows(4, 4)))


def squares(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """As `cpu_sums.squares`, of flat tensors `[elements]` on the device."""
    blocks = triton.cdiv(now.numel(), SQUARES_BLOCK)
    sums = torch.empty(blocks, 2, dtype=torch.float64, device=now.device)
    if blocks:
        _squares[(blocks,)](
            now, then, sums, now.numel(), BLOCK=SQUARES_BLOCK, LANES=SQUARES_LANES, enable_fp_fusion=False
        )
    return sums

"""Perturbing weights in place and taking it back to the bit, in Triton; see `cpu_inplace.py` for the idea.

Each block of 2,048 weights puts its patches where a counter on the device says there is room: first a word for each,
then two words with the bits of those that their own word does not suffice for. Which block comes first is a matter of
chance, and of no consequence, as each remembers its place. A block without room is left as it is, and the host, which
waits for the counter, begins again with more room.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from estune.noise import cpu_inplace as cpu
from estune.noise import cpu_split
from estune.noise.gpu import _TYPES, BASE, LIVE, Batch, Launch, _kernel, _narrow, _normals, _places, _pointer, _run
from estune.noise.gpu import NOISE as NOISE_KEY

SHIFT = tl.constexpr(cpu.PLACE_SHIFT)
CODE = tl.constexpr((1 << cpu.PLACE_SHIFT) - 1)
FURTHEST = tl.constexpr(cpu.FURTHEST)
HALFWAY = tl.constexpr(cpu_split.HALFWAY)
EXPECTED = 1 / 32  # patches of a weight, for which there is room to begin with


@_kernel
def _perturb(
    table, owners, words, capacity: tl.int64, used, starts, counts, seed: tl.uint64, sigma: tl.float32,
    TYPE: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    live = _pointer(run, LIVE, TYPE, ALIGNED)
    noise = tl.load(run + NOISE_KEY).to(tl.uint64, bitcast=True)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        weights = tl.load(live + place + at, mask=inside, other=0)
        change = _normals(seed, noise, low, high) * sigma
        half = _lower(run, place + at, inside, SPLIT, ALIGNED)
        perturbed = _narrow(_whole(weights, half, SPLIT) + change, TYPE)
        back = _guess(perturbed.to(tl.float32) - change, half, TYPE, SPLIT)
        bits = _bits(weights, BITS)
        off = bits - _bits(back, BITS)
        kept = _flat(tl.where(inside & (off != 0), 1, 0), COUNT)
        far = _flat(tl.where(inside & ((off > FURTHEST) | (off < -FURTHEST)), 1, 0), COUNT)
        both = kept | (far << 16)  # counted at once
        total = tl.sum(both, 0)
        before = tl.cumsum(both, 0) - both
        count = total & 0xFFFF
        needed = (count + 2 * (total >> 16)).to(tl.int64)
        start = tl.atomic_add(used, needed, sem="relaxed")
        fits = start + needed <= capacity
        end = tl.where(fits, 4 * COUNT, 0)
        lanes = tl.arange(0, 4 * COUNT)
        code = tl.where(far != 0, 0, _flat(off, COUNT) + FURTHEST + 1)
        mine = words + start + (before & 0xFFFF)
        tl.store(mine, ((lanes << SHIFT) | code).to(tl.uint16), mask=(kept != 0) & (lanes < end))
        behind = words + start + count + 2 * (before >> 16)
        whole = _flat(bits, COUNT).to(tl.uint32, bitcast=True)
        tl.store(behind, (whole & 0xFFFF).to(tl.uint16), mask=(far != 0) & (lanes < end))
        tl.store(behind + 1, (whole >> 16).to(tl.uint16), mask=(far != 0) & (lanes < end))
        tl.store(live + place + at, perturbed, mask=inside & (at < end))
        block = tl.program_id(0) * STEPS + step
        tl.store(starts + block, tl.where(fits, start, -1))
        tl.store(counts + block, count)


@_kernel
def _subtract(
    table, owners, starts, seed: tl.uint64, sigma: tl.float32, TYPE: tl.constexpr, SPLIT: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    live = _pointer(run, LIVE, TYPE, ALIGNED)
    noise = tl.load(run + NOISE_KEY).to(tl.uint64, bitcast=True)
    for step in range(steps):
        low, high, place, at, inside = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        # What had no room was not perturbed.
        end = tl.where(tl.load(starts + tl.program_id(0) * STEPS + step) < 0, 0, 4 * COUNT)
        inside = inside & (at < end)
        perturbed = tl.load(live + place + at, mask=inside, other=0).to(tl.float32)
        change = _normals(seed, noise, low, high) * sigma
        half = _lower(run, place + at, inside, SPLIT, ALIGNED)
        tl.store(live + place + at, _guess(perturbed - change, half, TYPE, SPLIT), mask=inside)


@_kernel
def _patch(
    table, owners, words, starts, counts, BITS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    run, first, steps = _run(table, owners, COUNT, STEPS, PITCHED)
    live = _pointer(run, LIVE, BITS, ALIGNED)
    for step in range(steps):
        _, _, place, _, _ = _places(run, first + step * COUNT, PITCHED, ALIGNED, COUNT)
        block = tl.program_id(0) * STEPS + step
        start = tl.load(starts + block)
        count = tl.where(start < 0, 0, tl.load(counts + block))
        behind = words + start + count
        for group in range(0, count, COUNT // 2):  # a patch a thread; as a rule one round does
            lanes = group + tl.arange(0, COUNT // 2)
            here = lanes < count
            word = tl.load(words + start + lanes, mask=here, other=1).to(tl.int32)
            code = word & CODE
            far = tl.where(code == 0, 1, 0)
            own = behind + 2 * (tl.cumsum(far, 0) - far)
            low = tl.load(own, mask=far != 0, other=0).to(tl.uint32)
            high = tl.load(own + 1, mask=far != 0, other=0).to(tl.uint32)
            weights = live + place + (word >> SHIFT)
            near = tl.load(weights, mask=here, other=0).to(tl.int32) + (code - FURTHEST - 1)
            whole = (low | (high << 16)).to(tl.int32, bitcast=True)
            tl.store(weights, tl.where(far != 0, whole, near).to(BITS), mask=here)
            behind += 2 * tl.sum(far, 0)


@triton.jit
def _lower(run, places, inside, SPLIT: tl.constexpr, ALIGNED: tl.constexpr):
    """The lower halves of weights that have them, which lie where others have their base."""
    if SPLIT:
        lower = _pointer(run, BASE, tl.uint16, ALIGNED)
        return tl.load(lower + places, mask=inside, other=0).to(tl.uint32)
    else:  # noqa: RET505  # which alone keeps Triton from looking at both
        return 0


@triton.jit
def _whole(weights, half, SPLIT: tl.constexpr):
    """As `cpu_inplace._whole`."""
    if SPLIT:
        upper = weights.to(tl.uint16, bitcast=True).to(tl.uint32) - (half > HALFWAY).to(tl.uint32)
        return ((upper << 16) | half).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return weights.to(tl.float32)


@triton.jit
def _guess(back, half, TYPE: tl.constexpr, SPLIT: tl.constexpr):
    """As `cpu_inplace._guess`, of the perturbed weight without the change."""
    if SPLIT:
        upper = (back.to(tl.uint32, bitcast=True) - half + HALFWAY) >> 16
        return (upper + (half > HALFWAY).to(tl.uint32)).to(tl.uint16).to(TYPE, bitcast=True)
    else:  # noqa: RET505
        return _narrow(back, TYPE)


@triton.jit
def _bits(weights, BITS: tl.constexpr):
    return weights.to(BITS, bitcast=True).to(tl.int32)


@triton.jit
def _flat(values, COUNT: tl.constexpr):
    return tl.reshape(values, (4 * COUNT,))


class Reversible:
    """A batch's runs, whose live weights are all that is kept, but for the patches of the last perturbation.

    Where the base of a run is int16, these are the lower halves of float32 weights: see `cpu_inplace.perturb`.
    """

    def __init__(self, batch: Batch) -> None:
        self.runs = batch.runs
        self._launches = batch._launches
        blocks = [len(launch.owners) * launch.flags["STEPS"] for launch in self._launches]
        self._device = batch.runs[0].live.device
        self._starts = [torch.empty(n, dtype=torch.int64, device=self._device) for n in blocks]
        self._counts = [torch.empty(n, dtype=torch.int32, device=self._device) for n in blocks]
        self._used = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._words = self._room(int(sum(len(run.live) for run in batch.runs) * EXPECTED))

    @property
    def nbytes(self) -> int:
        """Bytes of the patches, with those that are not used."""
        return sum(t.nbytes for t in (*self._starts, *self._counts, self._used, self._words))

    def perturb(self, seed: int, sigma: float) -> None:
        """As `cpu_inplace.perturb`, for all runs. It waits for the device, to see whether there was room."""
        while True:
            self._used.zero_()
            for launch, starts, counts in zip(self._launches, self._starts, self._counts, strict=True):
                types = {**_types(launch), "BITS": _bits_type(launch.live)}
                room = (self._words, len(self._words), self._used, starts, counts)
                launch.start(_perturb, *room, seed, sigma, **types)
            needed = int(self._used)
            if needed <= len(self._words):
                return
            self.restore(seed, sigma)
            self._words = self._room(int(needed * (1 + cpu.ROOM)))

    def restore(self, seed: int, sigma: float) -> None:
        """Take back the `perturb` of these arguments: every weight has the bits that it had before."""
        for launch, starts, counts in zip(self._launches, self._starts, self._counts, strict=True):
            launch.start(_subtract, starts, seed, sigma, **_types(launch))
            launch.start(_patch, self._words, starts, counts, BITS=_bits_type(launch.live))

    def _room(self, words: int) -> torch.Tensor:
        return torch.empty(max(words, 1), dtype=torch.uint16, device=self._device)


def _types(launch: Launch) -> dict[str, Any]:
    return {"TYPE": _TYPES[launch.live], "SPLIT": launch.base == torch.int16}


def _bits_type(dtype: torch.dtype) -> Any:
    return tl.uint32 if dtype.itemsize == 4 else tl.uint16

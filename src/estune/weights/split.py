"""A float32 base in the place of one of 16 bits: the live weights hold its upper half, and the lower half lies beside.

Live weights in bfloat16 are the base rounded to nearest, so that with the lower half of the base's bits they tell the
upper one: it is what they are, or one less where the lower half is more than 0x8000. Where it is 0x8000, the base was
halfway between two of bfloat16, and rounded to the even one; where that was up is noted. Hardly any weight is such a
tie, but for bases that come from types of few more bits than bfloat16, as float16.

With members the live weights change, and with nothing else: `noise/cpu_inplace.py` has what brings them back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from estune.noise.cpu_split import Halves


@dataclass(frozen=True, slots=True)
class SplitBase:
    """The base of some weights, `[elements]`, which can be read, written and cut as a float32 tensor can.

    Only while no member perturbs the live weights.

    Attributes:
        upper: the bits of the live weights, int16.
        lower: the lower halves, int16.
        length: elements of a block, for which ties are noted together.
        start: position of the first element in the whole.
        ties: of each block, by its number, the places of ties that are rounded up, int32, if there are any.
        lock: for changes of them.
    """

    dtype: ClassVar[torch.dtype] = torch.float32

    upper: Tensor
    lower: Tensor
    length: int
    start: int = 0
    ties: dict[int, Tensor] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, live: Tensor, length: int) -> SplitBase:
        """The base that live weights of bfloat16 are to the bit, flat `[elements]`, in blocks of a length."""
        upper = live.view(torch.int16)
        return cls(upper, torch.zeros_like(upper), length)

    def __len__(self) -> int:
        return len(self.upper)

    def __getitem__(self, place: slice) -> SplitBase:
        start, end, _ = place.indices(len(self))
        return replace(self, upper=self.upper[start:end], lower=self.lower[start:end], start=self.start + start)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.upper.device

    @property
    def lower_bits(self) -> Halves:
        """The lower halves of a base on the CPU, uint16 `[elements]`, its own memory."""
        return as_array(self.lower)

    @property
    def nbytes(self) -> int:
        """Bytes of both halves."""
        return len(self) * self.element_size()

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def split(self, length: int) -> Iterator[SplitBase]:
        """The same in parts of at most `length` elements."""
        return (self[i : i + length] for i in range(0, len(self), length))

    def read(self) -> Tensor:
        """The base, float32 `[elements]`, where it lies."""
        whole = join(self.upper, self.lower)
        for tied in self._tied():
            whole.view(torch.int32)[tied] -= 1 << 16
        return whole

    def cpu(self) -> Tensor:
        """A copy in the CPU's memory, float32 `[elements]`."""
        return self.read().cpu()

    def array(self) -> npt.NDArray[np.float32]:
        """A copy of a base on the CPU, `[elements]`."""
        found: npt.NDArray[np.float32] = self.read().numpy()
        return found

    def put(self, values: npt.NDArray[np.float32]) -> None:
        """As `copy_`, of an array."""
        self.copy_(torch.from_numpy(values))

    def copy_(self, values: Tensor, *, non_blocking: bool = False) -> None:
        """Make these numbers the base, float32 `[elements]`, and the live weights them, rounded to nearest."""
        places = split(values.to(self.device, non_blocking=non_blocking), self.upper, self.lower) + self.start
        with self.lock:
            for block in self._blocks():
                first = block * self.length
                kept = self.ties.get(block, places[:0].int())
                outside = (kept < self.start - first) | (kept >= self.start + len(self) - first)
                mine = places[(places >= first) & (places < first + self.length)] - first
                found = torch.cat((kept[outside], mine.int()))
                if len(found):
                    self.ties[block] = found  # at once, as who reads another part of the block takes no lock
                else:
                    self.ties.pop(block, None)

    def untie(self) -> None:
        """Round ties down, wherever the live weights are: then these and the lower halves tell the base."""
        for tied in self._tied():
            self.upper[tied] -= 1

    def tie(self) -> None:
        """Round ties to even again."""
        for tied in self._tied():
            self.upper[tied] += 1

    def _blocks(self) -> range:
        return range(self.start // self.length, -(-(self.start + len(self)) // self.length))

    def _tied(self) -> Iterator[Tensor]:
        """The places, from the first element here on, of ties that are rounded up."""
        for block in self._blocks():
            tied = self.ties.get(block)
            if tied is not None:
                places = tied.long() + (block * self.length - self.start)
                yield places[(places >= 0) & (places < len(self))]


def whole(base: Tensor | SplitBase) -> Tensor:
    """A base as a tensor where it lies, `[elements]`: a copy of one that is split."""
    return base.read() if isinstance(base, SplitBase) else base


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 weights of these halves, int16 `[elements]`, of which no tie is rounded up."""
    from estune.noise import cpu_split

    if upper.device.type == "cpu":
        return torch.from_numpy(cpu_split.join(as_array(upper), as_array(lower)))
    return join_by_torch(upper, lower)


def split(values: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Write the halves of float32 weights; return the places of ties that are rounded up, int64. All `[elements]`."""
    from estune.noise import cpu_split

    if upper.device.type == "cpu":
        return torch.from_numpy(cpu_split.split(values.numpy(), as_array(upper), as_array(lower)))
    return split_by_torch(values, upper, lower)


def join_by_torch(upper: Tensor, lower: Tensor) -> Tensor:
    """As `join`, on any device."""
    below = ((lower.int() + 0x7FFF) & 0xFFFF) - 0x7FFF  # from -0x7fff to 0x8000
    return ((upper.int() << 16) + below).view(torch.float32)


def split_by_torch(values: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """As `split`, on any device."""
    from estune.noise.cpu_split import TIED_BITS, TIED_UP

    bits = values.view(torch.int32)
    upper.copy_((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    lower.copy_(bits)
    return ((bits & TIED_BITS) == TIED_UP).nonzero().view(-1)


def as_array(halves: Tensor) -> Halves:
    """The memory of halves on the CPU as an array, uint16 `[elements]`."""
    return halves.numpy().view(np.uint16)

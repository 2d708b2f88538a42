"""Runs, which passes go over: parts of parameters, each one stretch of its tensor, or columns of it row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A run that holds `width` columns of a tensor of `pitch` columns, and leaves out the first `skip` elements.

    With `start` for the position of the first row's first element, that of the run's element i is
    start + (skip + i) // width * pitch + (skip + i) % width.
    """

    width: int
    pitch: int
    skip: int = 0

    @classmethod
    def one(cls, elements: int) -> Rows:
        """A run that is one stretch of its tensor, as one row."""
        return cls(elements, elements)


@dataclass(frozen=True, slots=True)
class Run:
    """Part of one parameter, its live weights and its base.

    They are flat, `[elements]`: tensors, or arrays as the CPU's kernels take them. Base and live weights are the same
    where nothing is kept beside the live weights; where a half is, the base is a `SplitBase` (`weights/split.py`), and
    to kernels that perturb in place on a device the lower halves.
    """

    live: Any
    base: Any
    key: int  # of the parameter, for its fingerprint
    noise: int  # of its noise
    start: int = 0  # first element's position in the parameter
    rows: Rows | None = None  # where it is columns of the parameter; otherwise one stretch of it
    counted: bool = True  # False for what another run counts in the fingerprint
    columns: int = 0  # of the parameter, where its noise is of low rank (`low_rank.py`)
    rank: int = 1  # of that noise
    scale: float = 1.0  # factor of its noise, a float32 value

    def part(self, start: int, end: int) -> Run:
        """Its elements from `start` up to `end`."""
        part = replace(self, live=self.live[start:end], base=self.base[start:end])
        if self.rows is None:
            return replace(part, start=self.start + start)
        return replace(part, rows=self.rows._replace(skip=self.rows.skip + start))

    def split(self, length: int) -> Iterator[Run]:
        """The same in parts of at most `length` elements."""
        for i in range(0, len(self.live), length):
            yield self.part(i, i + length)

    def stretches(self) -> Iterator[Run]:
        """The same in runs that each are one stretch of the parameter."""
        if self.rows is None:
            yield self
            return
        width, pitch, skip = self.rows
        done = 0
        while done < len(self.live):
            row, column = divmod(skip + done, width)
            end = min(done + width - column, len(self.live))
            yield replace(self.part(done, end), start=self.start + row * pitch + column, rows=None)
            done = end

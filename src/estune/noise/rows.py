"""Runs that are not one stretch of their tensor: columns of it, row by row."""

from __future__ import annotations

from typing import NamedTuple


class Rows(NamedTuple):
    """A run that holds `width` columns of a tensor of `pitch` columns, and leaves out the first `skip` elements.

    With `start` for the position of the first row's first element, that of the run's element i is
    start + (skip + i) // width * pitch + (skip + i) % width.
    """

    width: int
    pitch: int
    skip: int = 0

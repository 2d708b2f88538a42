"""Members of low-rank noise as the vectors that make their matrices, all in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from estune.engines.cpu.members import Drawn
from estune.es.strategy import Member
from estune.noise import cpu_draw
from estune.noise.reference import COLUMNS_AT, NEXT_AT

Vector = tuple[int, int, int]
"""Key, start and count of a stretch of noise."""
Stack = tuple[Vector, ...]
"""Vectors of one length, which lie side by side."""


def of_rows(drawn: Drawn) -> Stack:
    """The vectors a of a matrix' noise, a sum of a b^T; or the noise of a tensor of one dimension."""
    return tuple((drawn.noise, begin, drawn.shape[0]) for begin in _begins(drawn))


def of_columns(drawn: Drawn) -> Stack:
    """The vectors b of a matrix' noise, a sum of a b^T."""
    return tuple((drawn.noise, begin + COLUMNS_AT, drawn.shape[1]) for begin in _begins(drawn))


def _begins(drawn: Drawn) -> range:
    """Where the noise of each outer product begins; one for a tensor of one dimension."""
    return range(0, _rank(drawn) * NEXT_AT, NEXT_AT)


def _rank(drawn: Drawn) -> int:
    return drawn.rank if len(drawn.shape) == 2 else 1


class Vectors:
    """Draws the vectors of members. On a device a kernel draws all of a member's.

    Args:
        tensors: what members perturb, of one dimension or two.
        device: where they are drawn.

    Attributes:
        places: of each vector its first element among a member's, a multiple of 4.
        size: elements of a member's vectors, a multiple of 4.
    """

    def __init__(self, tensors: Iterable[Drawn], device: torch.device) -> None:
        tensors = list(tensors)
        self.places: dict[Vector, int] = {}
        self.size = 0
        for drawn in tensors:
            for vector in (*of_rows(drawn), *(of_columns(drawn) if len(drawn.shape) == 2 else ())):
                if vector not in self.places:
                    self.places[vector] = self.size
                    self.size += _padded(vector)
        self._device = device
        self._scales = torch.zeros(self.size, dtype=torch.float64, device=device)  # 0 for what sigma leaves alone
        for drawn in tensors:
            self.part(self._scales, of_rows(drawn)).fill_(drawn.scale / math.sqrt(_rank(drawn)))
        self._kernels: Any = None

    def part(self, whole: Tensor, stack: Stack) -> Tensor:
        """Where vectors lie in tensors whose last dimension is `size`, `[..., vectors, elements]`."""
        place = self.places[stack[0]]
        step = _padded(stack[0])
        rows = whole[..., place : place + len(stack) * step].view(*whole.shape[:-1], len(stack), step)
        return rows[..., : stack[0][2]]

    def draw(self, member: Member, sigma: float) -> Tensor:
        """A member's vectors, float32, `[size]`: of rows times sigma and their factors, of columns as drawn."""
        factors = (self._scales * (member.sign * sigma)).float()
        return self._noise(member.seed) * torch.where(self._scales == 0, 1.0, factors)

    def _noise(self, seed: int) -> Tensor:
        if self._device.type == "cuda":
            from estune.noise import gpu_low_rank

            self._kernels = self._kernels or gpu_low_rank.Vectors(self.places, self._device)
            drawn: Tensor = self._kernels.draw_one(seed)[0]
            return drawn
        found = torch.zeros(self.size)
        for vector in self.places:
            self.part(found, (vector,))[0].copy_(torch.from_numpy(cpu_draw.normal(seed, *vector)))
        return found.to(self._device)


def _padded(vector: Vector) -> int:
    """Elements that a vector takes."""
    return -(-vector[2] // 4) * 4

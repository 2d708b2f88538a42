"""Members of rank-one noise as the vectors that make their matrices, all in one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from estune.engines.cpu.members import Drawn
from estune.es.strategy import Member
from estune.noise import cpu
from estune.noise.reference import COLUMNS_AT

Vector = tuple[int, int, int]
"""Key, start and count of a stretch of noise."""


def of_rows(drawn: Drawn) -> Vector:
    """The vector a of a matrix' noise a b^T, or the noise of a tensor of one dimension."""
    return drawn.noise, 0, drawn.shape[0]


def of_columns(drawn: Drawn) -> Vector:
    """The vector b of a matrix' noise a b^T."""
    return drawn.noise, COLUMNS_AT, drawn.shape[1]


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
            for vector in [of_rows(drawn), *([of_columns(drawn)] if len(drawn.shape) == 2 else [])]:
                if vector not in self.places:
                    self.places[vector] = self.size
                    self.size += -(-vector[2] // 4) * 4
        self._device = device
        self._scales = torch.zeros(self.size, dtype=torch.float64, device=device)  # 0 for what sigma leaves alone
        for drawn in tensors:
            self.part(self._scales, of_rows(drawn)).fill_(drawn.scale)
        self._kernels: Any = None

    def part(self, whole: Tensor, vector: Vector) -> Tensor:
        """Where a vector lies in tensors whose last dimension is `size`."""
        place = self.places[vector]
        return whole[..., place : place + vector[2]]

    def draw(self, member: Member, sigma: float) -> Tensor:
        """A member's vectors, float32, `[size]`: of rows times the factor of their noise, of columns as they are."""
        factors = (self._scales * (member.sign * sigma)).float()
        return self._noise(member.seed) * torch.where(self._scales == 0, 1.0, factors)

    def _noise(self, seed: int) -> Tensor:
        if self._device.type == "cuda":
            from estune.noise import gpu_rank1

            self._kernels = self._kernels or gpu_rank1.Vectors(self.places, self._device)
            drawn: Tensor = self._kernels.draw_one(seed)[0]
            return drawn
        found = torch.zeros(self.size)
        for vector in self.places:
            self.part(found, vector).copy_(torch.from_numpy(cpu.normal(seed, *vector)))
        return found.to(self._device)

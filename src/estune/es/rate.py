"""The learning rate as it is given: a number, or one in units of sigma, by default one that knows how many members."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

UNIT = "sigma"
PAPERS = 30  # members, for which half of sigma is the paper's
LARGEST = 1.5  # sigmas: the most at which a constant rate was seen to be stable


@dataclass(frozen=True, slots=True)
class Rate:
    """A learning rate (alpha), 1/sigma absorbed in it.

    Attributes:
        number: alpha, or alpha / sigma; 0 or more.
        in_sigmas: whether it is a multiple of sigma, and follows it.
    """

    number: float
    in_sigmas: bool = False

    @classmethod
    def read(cls, given: float | str) -> Self:
        """What `0.012` or `0.5sigma` says.

        Raises:
            ValueError: it says nothing of the kind.
        """
        in_sigmas = isinstance(given, str) and given.endswith(UNIT)
        try:
            number = float(str(given).removesuffix(UNIT) if in_sigmas else given)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError("write a number from 0 on, or one in units of sigma, such as 0.5sigma")
        return cls(number, in_sigmas)

    @classmethod
    def default(cls, population: int) -> Self:
        """The rate of so many members where none is given: half of sigma up to 30, then sqrt(N / 30) / 2, at most 1.5.

        An update moves the weights by about alpha sqrt(d / N), most of which is noise: beyond 30 members it is the rate
        that moves them as far as the paper's 30 at half of sigma do (arXiv 2509.24372). To three digits.
        """
        return cls(min(round(math.sqrt(max(population, PAPERS) / PAPERS) / 2, 3), LARGEST), in_sigmas=True)

    def at(self, sigma: float) -> float:
        """Alpha at this sigma."""
        return self.number * sigma if self.in_sigmas else self.number

    def __str__(self) -> str:
        return f"{self.number!r}{UNIT if self.in_sigmas else ''}"

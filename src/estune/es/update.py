"""What an update adds, shared by training and replay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from estune.es.strategy import Member, Update


@dataclass(frozen=True, slots=True)
class Terms:
    """An update as kernels take it: members left out are gone, `rounding_seed` is None for rounding to nearest."""

    seeds: npt.NDArray[np.uint64]
    coefficients: npt.NDArray[np.float32]
    decay: float
    rounding_seed: int | None

    def scaled(self, scale: float) -> npt.NDArray[np.float32]:
        """The coefficients times the scale of a parameter's noise, each product rounded to float32, `[members]`."""
        return self.coefficients if scale == 1.0 else self.coefficients * np.float32(scale)


def terms(update: Update, rounding: str) -> Terms | None:
    """An update's terms, of some KB; None if it adds nothing. Its anchor is applied before, by itself."""
    pairs = [*update.pairs, *update.earlier]
    if not pairs and update.decay == 0.0:
        return None
    seeds = np.array([seed for seed, _ in pairs], np.uint64)
    coefficients = np.array([c for _, c in pairs], np.float32)
    return Terms(seeds, coefficients, update.decay, update.rounding_seed if rounding == "stochastic" else None)


def along(member: Member, sigma: float) -> Terms:
    """What a guided member's perturbation adds to the base."""
    pairs = [(member.seed, member.own), *member.along]
    coefficients = np.array([member.sign * sigma * c for _, c in pairs], np.float32)
    return Terms(np.array([seed for seed, _ in pairs], np.uint64), coefficients, 0.0, None)


def as_fingerprint(total: int) -> str:
    """The fingerprint that a sum of element hashes stands for."""
    return f"{total % 2**64:016x}"

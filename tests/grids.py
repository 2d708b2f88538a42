"""Integer weights by what their documentation says, in NumPy and apart from the package's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from estune.es.strategy import Update
from estune.noise import reference

F = np.float32
RANGES = {8: (-100, 99, 28), 4: (-7, 6, 1)}
ROUNDING = 0x9E3779B97F4A7C15


def uniform(seed: int, key: int, start: int, count: int) -> Any:
    """In [0, 1), float32 `[count]`: the upper 24 bits of the words of the seed, keyed by the tensor's other key."""
    first = start // 4
    words = reference.words(seed, key ^ ROUNDING, first, (start + count + 3) // 4 - first).ravel()
    return ((words >> 8).astype(F) * F(2.0**-24))[start - 4 * first :][:count]


def moves(seed: int, key: int, start: int, scales: Any, group: int, sigma: float, bits: int) -> Any:
    """A member's steps: its noise over the scale, rounded by the uniform number, at most as many as there is room."""
    count = len(scales) * group
    x = reference.normal_by_id(seed, key, start, count) * np.repeat(F(sigma) / scales, group)
    size = np.minimum(np.abs(x), F(RANGES[bits][2]))
    whole = np.floor(size)
    up = uniform(seed, key, start, count) < size - whole
    return np.copysign(whole + up, x).astype(F)


def on_grid(weights: Any, group: int, bits: int) -> tuple[Any, Any]:
    """Codes `[elements]` and scales `[groups]` of weights."""
    low, high, _ = RANGES[bits]
    groups = weights.reshape(-1, group)
    scales = np.array([row[np.argmax(np.abs(row))] / F(low) for row in groups], F)
    scales[scales == 0] = F(1e-20)
    return np.clip(np.rint(groups / scales[:, None]), low, high).ravel().astype(int), scales


class Latent:
    """A tensor's integer weights, and what is carried on."""

    def __init__(
        self, weights: Any, name: str, group: int, bits: int, window: int, *, stochastic: bool, coded: Any = None
    ) -> None:
        """`coded` are integers and scales of a quantised checkpoint, which fill their type."""
        self.type = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.range = RANGES[bits][:2] if coded is None else self.type
        self.codes, self.scales = on_grid(weights, group, bits) if coded is None else coded
        self.key = reference.tensor_id(name)
        self.group = group
        self.bits = bits
        self.window = window
        self.stochastic = stochastic
        self.error = np.zeros(len(self.codes), F)
        self.done = 0

    def member(self, seed: int, sign: int, sigma: float) -> Any:
        """The weights of a member."""
        return self.values((self.codes + sign * self.moves(seed, sigma).astype(int)).clip(*self.type))

    def moves(self, seed: int, sigma: float) -> Any:
        return moves(seed, self.key, 0, self.scales, self.group, sigma, self.bits)

    def apply(self, pairs: Sequence[tuple[int, float]], sigma: float, rounding_seed: int) -> None:
        """One update."""
        if self.done % self.window == 0:
            dither = uniform(rounding_seed, self.key, 0, len(self.codes)) - F(0.5)
            self.error = dither if self.stochastic else np.zeros(len(self.codes), F)
        wanted = np.zeros(len(self.codes), F)
        for seed, coefficient in pairs:
            wanted = wanted + F(coefficient / sigma) * self.moves(seed, sigma)
        wanted = self.error + wanted
        whole = np.floor(wanted + F(0.5))
        self.error = wanted - whole
        self.codes = np.clip(self.codes + whole.astype(int), *self.range)
        self.done += 1

    def take(self, update: Update) -> None:
        self.apply(update.pairs, update.sigma, update.rounding_seed)

    def values(self, codes: Any = None) -> Any:
        """What codes stand for."""
        return (
            (self.codes if codes is None else codes).astype(F).reshape(-1, self.group) * self.scales[:, None]
        ).ravel()

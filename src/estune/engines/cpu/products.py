"""Work on a CPU shared out over the threads that PyTorch may use, and matrix products by kernels of our own.

PyTorch's products are made for many rows. Decoding has a few dozen: at 24 rows of SmolLM2 ours took half the time, and
in bfloat16 a twentieth, on a processor that does not multiply bfloat16 itself. On one with a matrix unit, bfloat16 goes
there (`amx.py`), for 0.6 of the time of PyTorch's products, which use it too. On others that multiply bfloat16,
products of `MANY` rows and more are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import llvmlite.binding
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from estune.engines.cpu import amx, kernels
from estune.engines.memory import aligned_empty
from estune.noise import cpu_integers
from estune.weights.tensors import widen

MANY = 48
"""Rows from which on a processor's own products of bfloat16 are faster than ours of float32, as far as is known."""
FEWEST_SHARED = 1 << 19
"""Multiplications from which on threads share a product: fewer are done before another thread has woken."""
Array = npt.NDArray[Any]
NONE = np.empty(0, np.float32)
"""Stands for a bias, or for a norm's weight, that a model does not have."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix `[rows, width]` of integer weights (`noise/cpu_integers.py`), which is widened for each use."""

    codes: Array  # [rows, width], or half of it, packed
    scales: Array  # [rows, groups]
    width: int
    dtype: Any  # that it is widened to: float32, or uint16 for bfloat16's bits

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Coded:
        return Coded(self.codes[rows], self.scales[rows], self.width, self.dtype)

    def widened(self) -> Array:
        """The matrix, in memory of its own."""
        found = aligned_empty((len(self.codes), self.width), self.dtype)
        if len(self.codes):
            cpu_integers.values(self.codes.reshape(-1), self.scales.reshape(-1), found.reshape(-1))
        return found


class Products:
    """`x @ weight.T + bias`, called by one thread and computed by as many as PyTorch may use there.

    Attributes:
        unit: the processor has a matrix unit for bfloat16.
        native: it has none, and multiplies bfloat16 itself.
    """

    def __init__(self) -> None:
        self._multiply = kernels.product_kernel()
        self._threads: ThreadPoolExecutor | None = None
        self.unit = amx.available()
        self.native = not self.unit and multiplies_bfloat16()

    def __call__(self, x: Array, weight: Array | Coded, bias: Array = NONE) -> Array:
        """The product, float32 `[tokens, columns]`; each thread computes some of the columns.

        Args:
            x: float32 `[tokens, width]`, C-contiguous.
            weight: `[columns, width]`, C-contiguous: float32, or bfloat16 as its bits in uint16. The width is a
                multiple of 16.
            bias: `[columns]`, or empty.
        """
        if isinstance(weight, Coded):
            weight = weight.widened()
        if self.unit and weight.dtype == np.uint16 and not x.shape[1] % amx.DEPTH and not len(weight) % amx.BLOCK:
            return self._by_unit(x, weight, bias)
        if self.native and weight.dtype == np.uint16 and len(x) >= MANY:
            parts = [torch.from_numpy(part).view(torch.bfloat16) for part in (weight, bias) if part.size]
            return linear(torch.from_numpy(x).bfloat16(), *parts).float().numpy()
        out = aligned_empty((len(x), len(weight)))
        if out.size * x.shape[1] < FEWEST_SHARED:
            self._multiply(x, weight, out, 0, len(weight))
        else:
            self.in_parts(len(weight), lambda first, last: self._multiply(x, weight, out, first, last))
        return _with_bias(out, bias)

    def _by_unit(self, x: Array, weight: Array, bias: Array) -> Array:
        tokens, width = x.shape
        size = amx.BLOCK
        rounded = aligned_empty((-(-tokens // size) * size, width), np.uint16)
        rounded[tokens:] = 0
        amx.round_rows(x, rounded)
        out = aligned_empty((len(rounded), len(weight)))
        if tokens < amx.PACK_WEIGHTS_FROM:
            packed = aligned_empty((len(rounded) // size, size * width // 2))
            amx.pack(rounded.view(np.float32), packed)
            factors, scratch = (packed, weight), amx.SCRATCH
            multiply = amx.product
        else:
            factors, scratch = (rounded, weight.view(np.float32)), amx.panel(width)
            multiply = amx.product_of_many

        def part(first: int, last: int) -> None:
            multiply(*factors, out, first * size, last * size, amx.PALETTE, aligned_empty(scratch))

        self.in_parts(len(weight) // size, part)
        return _with_bias(out[:tokens], bias)

    def in_parts(self, count: int, work: Callable[[int, int], None]) -> None:
        """Share out `count` items over the threads: `work(first, end)` does items `first` to `end - 1`."""
        threads = min(count, torch.get_num_threads())
        if threads <= 1:
            work(0, count)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(torch.get_num_threads() - 1)
        bounds = [count * i // threads for i in range(threads + 1)]
        others = [self._threads.submit(work, *part) for part in pairwise(bounds[1:])]
        work(0, bounds[1])
        for other in others:
            other.result()


def _with_bias(product: Array, bias: Array) -> Array:
    """The product `[tokens, columns]` itself, after a bias has been added to it, `[columns]` or empty."""
    if bias.size:
        product += widen(bias)
    return product


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16: AMX or AVX512-BF16."""
    features = llvmlite.binding.get_host_cpu_features()
    return any(features.get(name) for name in ("amx-bf16", "avx512bf16"))

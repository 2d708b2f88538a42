"""Keys and values of the fused decoder's rows, in memory that is kept from one batch to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy.typing as npt

from estune.engines.cpu.products import Array
from estune.engines.cpu.simd import WIDTH
from estune.engines.memory import aligned_empty, memory_for


@dataclass(frozen=True)
class Cache:
    """Keys `[layers, rows, heads, slots / 16, dim, 16]` and values `[layers, rows, heads, slots, dim]`."""

    keys: Array
    values: Array


class Caches:
    """The caches of one model.

    Args:
        layers, heads: of the model; heads are those of keys and values.
        dim: elements of a head.
        dtype: that keys and values are kept in.

    Attributes:
        storage: what is kept, `[elements]`, by name.
    """

    def __init__(self, layers: int, heads: int, dim: int, dtype: npt.DTypeLike) -> None:
        self._layers = layers
        self._heads = heads
        self._dim = dim
        self._dtype = dtype
        self.storage: dict[str, Array] = {}

    def kept(self, name: str, rows: int, slots: int) -> Cache:
        """A cache in storage that is kept, under this name, from one batch to the next."""
        size = self._size(rows, slots)
        if name not in self.storage or len(self.storage[name]) < size:
            self.storage.pop(name, None)  # the old one goes before the new one comes
            self.storage[name] = self._memory(size)
        return self._cache_in(self.storage[name][:size], rows)

    def new(self, rows: int, slots: int) -> Cache:
        """A cache in storage of its own."""
        return self._cache_in(self._memory(self._size(rows, slots)), rows)

    def _size(self, rows: int, slots: int) -> int:
        """Elements of a cache, whose slots are a multiple of 16."""
        return 2 * self._layers * rows * self._heads * -(-slots // WIDTH) * WIDTH * self._dim

    def _memory(self, size: int) -> Array:
        with memory_for("the key/value cache", "lower batch_size or max_new_tokens"):
            return aligned_empty(size, self._dtype)

    def _cache_in(self, memory: Array, rows: int) -> Cache:
        keys, values = memory.reshape(2, self._layers, rows, self._heads, -1, self._dim)
        return Cache(keys.reshape(*keys.shape[:3], -1, self._dim, WIDTH), values)

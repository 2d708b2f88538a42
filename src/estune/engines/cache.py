"""A key and value cache that is allocated once and used again by every member."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from estune.engines.memory import memory_for


class RowCache(Cache):  # type: ignore[misc]  # transformers carries no types
    """Keys and values of a batch, `[rows, heads, slots, head_dim]` per layer, in storage that outlives the batch.

    The decode loop says where a forward reads and writes: `open` before a batch, `at` before a forward. A forward of
    `q` tokens writes slots `length` to `length + q` of its rows and sees all slots before them, never a slot that
    this batch did not write. Every layer keeps the full length; a sliding window is left to the model's mask.

    After `fix` instead of `at`, forwards of one token work on shapes that do not change from step to step: the slot
    they write is read from a tensor, and they see as many slots as the caller says, to be masked by the caller.

    Attributes:
        storage: all memory held for keys and values, by layer and kind, whatever the batch.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers
        self.rows = slice(0, 0)
        self.length = 0
        self._gap = 0
        self._slot: torch.Tensor | None = None
        self._visible = 0
        self.storage: dict[tuple[int, str], torch.Tensor] = {}
        self._shape = (0, 0)
        self._blank = False

    def open(self, rows: int, slots: int, *, blank: bool = False) -> None:
        """Start a batch of `rows` sequences of at most `slots` tokens; `blank` zeroes the slots of all of them."""
        self._shape = (rows, slots)
        self._blank = blank
        self.at(slice(0, rows), 0)
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)

    def at(self, rows: slice, length: int, gap: int = 0) -> None:
        """Let forwards work on `rows`, of which `length` slots are filled.

        The last `gap` of them hold padding that no forward writes. They are zeroed with the next write: a mask makes
        their weight 0, and 0 times what a slot held before could be NaN.
        """
        self.rows = rows
        self.length = length
        self._gap = gap
        self._slot = None

    def fix(self, rows: int, visible: int, slot: torch.Tensor) -> None:
        """Let forwards of one token work on the first `rows` rows of a blank batch and see their `visible` first slots.

        `slot`, int64 `[1]` on the device, is where they write; it may change between two runs of the same operations.
        """
        self.rows = slice(0, rows)
        self._visible = visible
        self._slot = slot

    def update(  # type: ignore[no-untyped-def]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of new tokens; return those of all tokens so far, views of the storage.

        Both are `[rows, heads, tokens, head_dim]`, given and returned.
        """
        keys = self.keys[layer_idx]
        values = self.values[layer_idx]
        if keys is None or values is None:
            keys = self.keys[layer_idx] = self._view(layer_idx, "keys", key_states)
            values = self.values[layer_idx] = self._view(layer_idx, "values", value_states)
        if self._slot is not None:
            keys = keys[self.rows, :, : self._visible]
            values = values[self.rows, :, : self._visible]
            return keys.index_copy_(2, self._slot, key_states), values.index_copy_(2, self._slot, value_states)
        end = self.length + key_states.shape[2]
        keys = keys[self.rows, :, :end]
        values = values[self.rows, :, :end]
        keys[:, :, self.length :] = key_states
        values[:, :, self.length :] = value_states
        if self._gap:
            keys[:, :, self.length - self._gap : self.length] = 0
            values[:, :, self.length - self._gap : self.length] = 0
        return keys, values

    def _view(self, layer: int, kind: str, states: torch.Tensor) -> torch.Tensor:
        """The batch's view of one layer's storage, which grows when a larger batch than ever before asks for it."""
        shape = (self._shape[0], states.shape[1], self._shape[1], states.shape[3])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        storage = self.storage.get((layer, kind))
        if storage is None or storage.numel() < size or storage.dtype != states.dtype:
            with memory_for("the key/value cache", "lower batch_size or max_new_tokens"):
                storage = self.storage[layer, kind] = torch.empty(size, dtype=states.dtype, device=states.device)
        view = storage[:size].view(shape)
        return view.zero_() if self._blank else view

    def tensors(self) -> list[torch.Tensor]:
        """This batch's keys and values of all layers that hold any, `[rows, heads, slots, width]` each."""
        return [tensor for tensor in (*self.keys, *self.values) if tensor is not None]

    def spread(self, slots: int, rows: torch.Tensor | None = None) -> None:
        """Give every row the first `slots` slots of row 0: the prefix that all prompts share.

        With `rows`, int64 `[rows]`, each row those of the row named there.
        """
        for tensor in self.tensors():
            if rows is None:
                tensor[1:, :, :slots] = tensor[:1, :, :slots]
            else:
                tensor[: len(rows), :, :slots] = tensor[rows, :, :slots]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole rows, as far as they are filled, from row indices `source` to `target`, `[rows moved]` each."""
        for tensor in self.tensors():
            filled = tensor[:, :, : self.length]
            filled.index_copy_(0, target, filled.index_select(0, source))

    # What transformers' mask building asks of a cache.

    @property
    def is_compileable(self) -> bool:
        """Whether masks must be made even where none is needed, for a compiler's sake."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers keep a window only."""
        return [False] * len(self.keys)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep a state instead of keys and values."""
        return [False] * len(self.keys)

    @property
    def is_dummy(self) -> list[bool]:
        """Which layers keep nothing."""
        return [False] * len(self.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Slots filled before the forward at hand: a number, or a tensor `[]` where steps are captured."""
        return self.length if self._slot is None else self._slot[0]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that the forward at hand will see."""
        return (self.length + query_length if self._slot is None else self._visible), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots of each row of the batch."""
        return self._shape[1]

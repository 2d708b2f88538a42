"""Products of adapters on a CPU, made for all rows of a slot at once. Imported inside vLLM's workers alone.

vLLM's own copy the adapter of each row out of its slot, for every row of a batch in every layer, which is more memory
traffic than the model: a batch of SmolLM2's took fourteen times as long as without adapters. On a GPU it has kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class BySlot(PunicaWrapperCPU):  # type: ignore[misc]
    """Groups the rows of a batch by their slots."""

    def update_metadata(self, mapping: Any, *args: Any, **options: Any) -> None:
        """As vLLM's; and note which rows each slot has.

        `_held` `[groups]` are the slots that have any, `_rows` `[rows]` the rows in their order, and `_padded` `[rows]`
        where each stands among `groups * most` rows, in which each group is filled up to the largest.
        """
        super().update_metadata(mapping, *args, **options)
        slots = self.token_lora_indices
        order = torch.argsort(slots, stable=True)
        self._held, counts = torch.unique(slots[slots >= 0], return_counts=True)
        groups = len(counts)
        total = int(counts.sum())
        self._most = int(counts.max()) if groups else 0
        self._rows = order[len(order) - total :]
        begins = torch.arange(groups) * self._most - (counts.cumsum(0) - counts)
        self._padded = torch.arange(total) + torch.repeat_interleave(begins, counts)
        # Rows that stand so already need not be copied, nor the slots if all have rows.
        self._in_order = groups * self._most == len(slots) and bool((self._rows == torch.arange(total)).all())
        self._first_ones = bool((self._held == torch.arange(groups)).all())
        # If all rows have a slot: where each stands among the padded ones.
        self._all = total == len(slots)
        self._where = torch.empty_like(self._padded).index_copy_(0, self._rows, self._padded) if self._all else None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **options: Any,
    ) -> None:
        """As vLLM's: add to each row of `y` `[rows, outputs]` what its slot's adapter makes of `x` `[rows, inputs]`."""
        if not len(self._held):
            return
        x = x.view(-1, x.shape[-1])
        y = y.view(-1, y.shape[-1])
        grouped = self._grouped(x)
        first = 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            low = torch.bmm(grouped, self._slots(a).transpose(1, 2))
            part = y[:, first : first + size]
            if self._all and b.shape[-1] == 1:
                self._add_outer(part, low, b, scale)
            else:
                added = torch.bmm(low, self._slots(b).transpose(1, 2)).view(-1, size)
                if self._in_order:
                    part.add_(added, alpha=scale)
                else:
                    part.index_add_(0, self._rows, added[self._padded], alpha=scale)
            first += size

    def _add_outer(self, part: Tensor, low: Tensor, b: Tensor, scale: float) -> None:
        """Add `low` `[groups, most, 1]` times `b`, of rank one, in one pass: a product of matrices would be a copy."""
        if self._in_order:
            part.view(*low.shape[:2], -1).addcmul_(low, self._slots(b).transpose(1, 2), value=scale)
        else:
            part.addcmul_(low.view(-1, 1)[self._where], b[self.token_lora_indices, 0, :, 0], value=scale)

    def _grouped(self, x: Tensor) -> Tensor:
        """The rows by slot, `[groups, most, inputs]`."""
        if not self._in_order:
            filled = x.new_zeros(len(self._held) * self._most, x.shape[-1])
            x = filled.index_copy_(0, self._padded, x[self._rows])
        return x.view(len(self._held), self._most, -1)

    def _slots(self, stacked: Tensor) -> Tensor:
        """The adapters of the slots that have rows."""
        return stacked[: len(self._held), 0] if self._first_ones else stacked[self._held, 0]

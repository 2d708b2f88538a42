"""A tape that stands in for a CUDA graph, on the CPU.

It repeats recorded operations on the very tensors they were recorded with, Python numbers included, and refuses what
waits for the device. A step that reads anything else fails here as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records operations while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._own: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if func == torch.ops.aten.index.Tensor:  # tagged for masks, which it counts; numbers it takes as they are
            waits = any(tensor.dtype == torch.bool for tensor in inputs[1:])
        if waits:
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        if func._schema.is_mutable:
            for place in map(torch.Tensor.untyped_storage, inputs):
                if place.data_ptr() not in self._own | self._before.keys():
                    self._before[place.data_ptr()] = place, place.clone()
        result = func(*args, **kwargs)
        used = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        made = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in used]
        self._own |= {tensor.untyped_storage().data_ptr() for tensor in made}
        if made or func._schema.is_mutable:  # a view stays what it is
            self.operations.append((func, args, kwargs, made))
        return result

    def undo(self) -> None:
        """Put back what stood in tensors that are not the recording's own: a capture runs nothing."""
        for place, content in self._before.values():
            place.copy_(content)

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            fresh = func(*args, **kwargs)
            for old, new in zip(made, tree_leaves(fresh), strict=False):
                old.copy_(new)


class TapeRecorder:
    """Tapes in place of CUDA graphs."""

    def __init__(self) -> None:
        self.warmed = self.replayed = self.forgotten = 0
        self.tapes: list[Tape] = []

    def warm(self, step: Callable[[], None]) -> None:
        self.warmed += 1
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        tape = Tape()
        with tape:
            step()
        tape.undo()
        self.tapes.append(tape)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay

    def forget(self) -> None:
        self.forgotten += 1

"""An adapter in one of vLLM's workers: trained here, and written into the slots of vLLM's LoRA layers, one a member.

The adapter itself lies beside them, in float32 and by PEFT's names, so that its bits, its noise and its updates are
those of any other engine's. What is written is what vLLM makes of a file with these values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from estune.engines.vllm import lora
from estune.engines.vllm.shard import Opening, Shard
from estune.engines.vllm.slots import Slots
from estune.es.strategy import Member
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter
from estune.weights.tensors import widen


class AdapterShard(Shard):
    """A whole adapter, and the slots of this worker's layers.

    Every worker of a model that is split has the whole, which is small, and one of them counts it.
    """

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self._adapter: dict[str, Tensor] = {}  # by PEFT's names, float32
        self._slots: Slots | None = None

    def held(self) -> dict[str, Tensor]:
        """The tensors of all slots."""
        return lora.stacked(self._worker)

    def draw(self, path: Path) -> None:
        """Find where the adapter's tensors go. vLLM must have filled all slots with it.

        Raises:
            EstuneError: layers that the adapter is for have no such place.
        """
        self._hold()
        device = next(iter(self._tensors.values())).device
        self._adapter = {
            name: torch.from_numpy(widen(tensor.stored(0, tensor.elements))).view(tensor.shape).to(device, copy=True)
            for name, tensor in Checkpoint(path).tensors.items()
        }
        self._slots = Slots(self._worker, path, self._adapter)

    def parameters(self, opening: Opening) -> list[Parameter]:
        """The chosen tensors of the adapter."""
        return [Parameter(name, self._adapter[name], counted=self._rank == 0) for name in opening.chosen]

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make each slot, from the first on, a member's."""
        assert self.weights is not None
        for number, member in enumerate(members):
            self.weights.perturb(member, sigma)
            self._write(number)
        self._wait()

    def perturb(self, member: Member, sigma: float) -> None:
        """As `Weights.perturb`."""
        self.take([member], sigma)

    def restore(self) -> None:
        """As `Weights.restore`."""
        super().restore()
        self._write(lora.FIRST)

    def show(self, path: Path) -> None:
        """As `Weights.show`."""
        super().show(path)
        self._write(lora.FIRST)

    def _write(self, number: int) -> None:
        """Write the live adapter into a slot."""
        assert self._slots is not None
        self._slots.write(number)

    def _check_addresses(self) -> None:
        super()._check_addresses()
        assert self._slots is not None
        self._slots.check()

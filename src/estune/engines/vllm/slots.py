"""What one of vLLM's workers writes into the slots of its LoRA layers, where they lie: one slot is one member's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from estune.engines.cpu.members import Drawn
from estune.engines.vectors import Vectors, of_columns, of_rows
from estune.engines.vllm import lora
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.weights.adapters import PREFIX


class Slots:
    """The slots of a worker's layers, which vLLM must have filled with an adapter of the kind that is written.

    Args:
        worker: vLLM's.
        adapter: the directory of that adapter.
        tensors: what is written, by PEFT's names, where it lies: `[rank, inputs]` and `[outputs, rank]`.

    Raises:
        EstuneError: layers that the tensors are for have no such place.
    """

    def __init__(self, worker: Any, adapter: Path, tensors: Mapping[str, Tensor]) -> None:
        self._worker = worker
        self._places = lora.places(worker, adapter, tensors)
        self._indices = lora.indices(worker)  # where each slot lies in vLLM's tensors

    def write(self, number: int) -> None:
        """Write the tensors into a slot."""
        lora.write(self._places, self._indices[number])

    def check(self) -> None:
        """Check that the slots are where they were.

        Raises:
            EstuneError: they are not.
        """
        if lora.indices(self._worker) != self._indices:
            raise EstuneError("vLLM has moved its adapters to other slots since the start: start the run again")


class OuterProducts:
    """Members of low-rank noise in slots: of the noise a b^T of a matrix, A is b^T and B is a, times its factor.

    Of a higher rank, the vectors of the outer products are the rows of A and the columns of B.

    Args:
        worker: vLLM's.
        adapter: the directory of an adapter of that rank for the same matrices, with which vLLM has filled the slots.
        tensors: the matrices, by the checkpoint's names.
        device: of the worker.

    Raises:
        EstuneError: as of `Slots`.
    """

    def __init__(self, worker: Any, adapter: Path, tensors: Mapping[str, Drawn], device: torch.device) -> None:
        self._vectors = Vectors(tensors.values(), device)
        self._one = torch.zeros(self._vectors.size, device=device)  # the vectors of the member that is written
        held = {}
        for name, drawn in tensors.items():
            first, second = names_of(name)
            held[first] = self._vectors.part(self._one, of_columns(drawn))
            held[second] = self._vectors.part(self._one, of_rows(drawn)).T
        self._slots = Slots(worker, adapter, held)
        self.check = self._slots.check

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make each slot, from the first on, a member's."""
        for number, member in enumerate(members):
            self._one.copy_(self._vectors.draw(member, sigma))
            self._slots.write(number)


def names_of(matrix: str) -> tuple[str, str]:
    """PEFT's names of the two tensors of an adapter of a matrix, by the checkpoint's name of it."""
    module = PREFIX + matrix.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

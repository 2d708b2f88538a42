"""What one of vLLM's workers writes into the slots of its LoRA layers, where they lie: one slot is one member's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from estune.engines.cpu.members import Drawn
from estune.engines.vectors import Vectors, of_columns, of_rows
from estune.engines.vllm import lora
from estune.engines.vllm.parameter_map import Place
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.weights.adapters import PREFIX


class Slots:
    """The slots of a worker's layers, which vLLM must have filled with an adapter of the kind that is written.

    Args:
        worker: vLLM's.
        adapter: the directory of that adapter.
        tensors: what is written, by PEFT's names, where it lies: `[rank, inputs]` and `[outputs, rank]`.
        others: places of what is written beside the LoRA layers.

    Raises:
        EstuneError: layers that the tensors are for have no such place.
    """

    def __init__(
        self, worker: Any, adapter: Path, tensors: Mapping[str, Tensor], others: Sequence[lora.Place] = ()
    ) -> None:
        self._worker = worker
        self._places = [*lora.places(worker, adapter, tensors), *others]
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

    Of a higher rank, the vectors of the outer products are the rows of A and the columns of B. What is no matrix of a
    layer goes beside the LoRA layers (`additions.py`).

    Args:
        worker: vLLM's.
        adapter: the directory of an adapter of that rank for the same matrices, with which vLLM has filled the slots.
        tensors: what members add to, by the checkpoint's names.
        beside: the places of those that are no matrices of layers, each with vLLM's tensor.
        device: of the worker.

    Raises:
        EstuneError: a tensor has no place, or as of `Slots`.
    """

    def __init__(
        self,
        worker: Any,
        adapter: Path,
        tensors: Mapping[str, Drawn],
        beside: Sequence[tuple[Place, Tensor]],
        device: torch.device,
    ) -> None:
        self._tensors = tensors
        self._vectors = Vectors(tensors.values(), device)
        self._one = torch.zeros(self._vectors.size, device=device)  # the vectors of the member that is written
        held = {}
        for name in lora.matrices({name: drawn.shape for name, drawn in tensors.items()}):
            first, second = names_of(name)
            held[first] = self._columns(name)
            held[second] = self._rows(name).T
        others = []
        for place, live in beside:
            columns = self._columns(place.name) if len(tensors[place.name].shape) > 1 else None
            others += worker.model_runner.estune_additions.places(place, live, self._rows(place.name), columns)
        self._slots = Slots(worker, adapter, held, others)
        self.check = self._slots.check

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make each slot, from the first on, a member's."""
        for number, member in enumerate(members):
            self._one.copy_(self._vectors.draw(member, sigma))
            self._slots.write(number)

    def take_part(self, slot: int, member: Member, sigma: float, names: Collection[str]) -> None:
        """Make a slot a member's that adds to these tensors alone."""
        self._one.copy_(self._vectors.draw(member, sigma))
        for name in self._tensors.keys() - names:
            self._rows(name).zero_()
        self._slots.write(slot)

    def _rows(self, name: str) -> Tensor:
        """The vectors a of a matrix' noise, `[rank, rows]`, or the noise of a vector, `[1, elements]`."""
        return self._vectors.part(self._one, of_rows(self._tensors[name]))

    def _columns(self, name: str) -> Tensor:
        """The vectors b of a matrix' noise, `[rank, columns]`."""
        return self._vectors.part(self._one, of_columns(self._tensors[name]))


def names_of(matrix: str) -> tuple[str, str]:
    """PEFT's names of the two tensors of an adapter of a matrix, by the checkpoint's name of it."""
    module = PREFIX + matrix.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

"""The weights of one of vLLM's workers, of which there is one for each process that shares a model.

vLLM imports this module in each worker before it builds the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from estune.engines.vllm import internals
from estune.engines.vllm.parameter_map import Place, by_rows, draw_map
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.noise.reference import tensor_id
from estune.noise.rows import Run
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import device_kind, synchronize
from estune.weights.parameters import Parameter
from estune.weights.policies import Rule
from estune.weights.storage import Array, Storage, as_array, flat, open_storage
from estune.weights.weights import Weights

internals.keep_weights_plain()

STRETCH = 64  # elements of a stretch that is compared with what it should be
SHAKEN = 0x5AFE  # seed of the noise that weights are overwritten with before a check


@dataclass(frozen=True, slots=True)
class Opening:
    """Which weights a worker trains, and how it keeps them."""

    checkpoint: Path
    rule: Rule
    threads: int
    base_on_host: bool
    chosen: Mapping[str, tuple[str, ...]]  # the tensors to train, each with its aliases
    counted: Mapping[int, list[bool]]  # by rank, for each place


@dataclass(frozen=True, slots=True)
class Sample:
    """A stretch of live weights: the checkpoint tensor, the position in it, the type and the elements."""

    name: str
    start: int
    dtype: str
    values: Array


class WorkerExtension:
    """What vLLM adds to its workers."""

    def estune(self, method: str, *args: Any) -> Any:
        """Call a method of this worker's `Shard`."""
        if not hasattr(self, "_estune_shard"):
            self._estune_shard = Shard(self)
        return self._estune_shard.call(method, *args)


class Shard:
    """The live weights of one worker, and the base beside them.

    Args:
        worker: vLLM's.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._rank = int(worker.rank)
        self._places: list[Place] = []
        self._tensors: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}
        self.weights: Weights | None = None

    def call(self, method: str, *args: Any) -> Any:
        """Call one of the methods below, or of the weights.

        An `EstuneError` comes back as the answer: vLLM would wrap one that is raised in errors of its own.
        """
        try:
            with torch.no_grad():
                if method != "draw":
                    self._check_addresses()
                return getattr(self if hasattr(self, method) else self.weights, method)(*args)
        except EstuneError as error:
            return error

    def draw(self, path: Path) -> tuple[int, list[Place]]:
        """This worker's rank, and the map of its tensors, which hold the same as before afterwards.

        Raises:
            EstuneError: they are not rectangles of the checkpoint's tensors, used as they are.
        """
        why = internals.untrainable(self._worker)
        if why is not None:
            raise EstuneError(f"engine=vllm cannot train this model: {why}; use engine=transformers")
        checkpoint = Checkpoint(path)
        load = partial(internals.load, self._worker)
        if self.weights is not None:  # they are drawn again, in a server that a run has left
            self.weights = None
            load(_stored(checkpoint))
        self._tensors = internals.live_tensors(self._worker)
        self._addresses = {name: tensor.data_ptr() for name, tensor in self._tensors.items()}
        before = self.digests()
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        self._places = draw_map(self._tensors, shapes, load)
        load(_stored(checkpoint))
        self._compare(before, "reloading the checkpoint")
        return self._rank, self._places

    def open(self, opening: Opening) -> None:
        """Keep a base beside the live weights, and check that restoring from it gives exactly what they were.

        Raises:
            EstuneError: it does not.
        """
        before = self.digests()
        counted = opening.counted[self._rank]
        parameters = [
            Parameter(place.name, self._live(place), opening.chosen[place.name], place.part, counts)
            for place, counts in zip(self._places, counted, strict=True)
            if place.name in opening.chosen
        ]
        self.weights = Weights(
            parameters,
            policy=opening.rule.policy,
            rounding=opening.rule.rounding,
            noise=opening.rule.noise,
            scales=opening.rule.scales,
            threads=opening.threads,
            base_on_host=opening.base_on_host,
        )
        self.weights.subset(lambda parameter: True).perturb(SHAKEN, 1.0)
        self.load(opening.checkpoint)
        self.weights.restore()
        self._compare(before, "loading it by the map of the parameters")

    def kind(self) -> str:
        """The kind of the device that the weights are on."""
        return device_kind(next(iter(self._tensors.values())).device)

    def perturb(self, member: Member, sigma: float) -> None:
        """As `Weights.perturb`, but wait until it is done, so that it is timed: only this process can wait."""
        assert self.weights is not None
        self.weights.perturb(member, sigma)
        synchronize(next(iter(self._tensors.values())).device)

    def load(self, path: Path) -> None:
        """As `Weights.load`."""
        assert self.weights is not None
        self.weights.load(Checkpoint(path))

    def show(self, path: Path) -> None:
        """As `Weights.show`."""
        assert self.weights is not None
        self.weights.show(Checkpoint(path))

    def change_sums(self, path: Path) -> tuple[float, float]:
        """As `Weights.change_sums`."""
        assert self.weights is not None
        return self.weights.change_sums(Checkpoint(path))

    def anchor(self, path: Path, update: Update) -> None:
        """As `Weights.anchor`."""
        assert self.weights is not None
        self.weights.anchor(Checkpoint(path), update)

    def digests(self) -> dict[str, int]:
        """A hash of the bits of each live tensor, padding included, by vLLM's name."""
        runs = {name: flat(tensor) for name, tensor in self._tensors.items()}
        return {name: open_storage([Run(t, t, tensor_id(name), 0)], 1).fingerprint() for name, t in runs.items()}

    def samples(self) -> list[Sample]:
        """The first, a middle and the last stretch of each part of a trained tensor, from the layers themselves."""
        now = internals.live_tensors(self._worker)
        found = []
        assert self.weights is not None
        trained = {p.name for p in self.weights.parameters}
        for place in self._places:
            if place.name not in trained:
                continue
            part = place.part
            rows = by_rows(now[place.tensor])
            for i in sorted({0, part.rows // 2, part.rows - 1}):
                values = rows[place.row + i][-STRETCH:].contiguous()
                start = part.start + i * part.pitch + part.width - len(values)
                found.append(Sample(place.name, start, str(values.dtype), as_array(values.cpu())))
        return found

    def placed(self) -> list[Place]:
        """The map of this worker's tensors."""
        return self._places

    def live_arrays(self) -> dict[str, Array]:
        """Copies of all live tensors by vLLM's names, to look at in small models."""
        now = internals.live_tensors(self._worker)
        return {name: as_array(t.cpu()).copy().reshape(t.shape) for name, t in now.items()}

    def matrices(self) -> list[str]:
        """vLLM's names of the tensors of two dimensions that are trained as a whole."""
        trained = {p.name for p in self.weights.parameters} if self.weights else set()
        held: dict[str, bool] = {}
        for place in self._places:
            held[place.tensor] = held.get(place.tensor, True) and place.name in trained
        return [name for name, whole in held.items() if whole and self._tensors[name].ndim == 2]

    def shake(self, name: str, sigma: float) -> None:
        """Perturb one of vLLM's tensors alone, around the base or, without one, from where it is."""
        self._alone(name).perturb(SHAKEN, sigma)

    def unshake(self, name: str, path: Path) -> None:
        """Make it what it was again."""
        assert self.weights is not None
        if self.weights.rule.how.keeps_base:
            self._alone(name).restore()
        else:
            self.load(path)

    def _alone(self, name: str) -> Storage:
        assert self.weights is not None
        lie = {self._live(place).data_ptr() for place in self._places if place.tensor == name}
        return self.weights.subset(lambda parameter: parameter.tensor.data_ptr() in lie)

    def _live(self, place: Place) -> Tensor:
        return by_rows(self._tensors[place.tensor])[place.row : place.row + place.part.rows].view(-1)

    def _compare(self, before: Mapping[str, int], what: str) -> None:
        now = self.digests()
        changed = next((name for name, digest in before.items() if now[name] != digest), None)
        if changed is not None:
            raise EstuneError(
                f"engine=vllm cannot train this model: {what} does not give back {changed}, which vLLM must keep in a "
                "layout of its own; use engine=transformers"
            )

    def _check_addresses(self) -> None:
        now = internals.live_tensors(self._worker)
        moved = next((name for name, address in self._addresses.items() if now[name].data_ptr() != address), None)
        if moved is not None or len(now) != len(self._addresses):
            raise EstuneError(
                f"vLLM has moved its weights ({moved or 'new ones'}) since the start: start the run again"
            )


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, file by file."""
    for file in dict.fromkeys(tensor.file for tensor in checkpoint.tensors.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it cannot be iterated over
                yield name, opened.get_tensor(name)

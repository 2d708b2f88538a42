"""The weights of one of vLLM's workers, of which there is one for each process that shares a model.

vLLM imports this module in each worker before it builds the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from estune.engines.cpu.members import Drawn
from estune.engines.vllm import additions, internals, lora
from estune.engines.vllm.adapter import AdapterShard
from estune.engines.vllm.parameter_map import Place, by_rows, draw_map
from estune.engines.vllm.shard import SHAKEN, Opening, Shard, digests
from estune.engines.vllm.slots import OuterProducts
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.weights.adapters import is_adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter
from estune.weights.storage import Array, Storage, as_array

internals.keep_weights_plain()
lora.group_products()
additions.serve_when_told()

STRETCH = 64  # elements of a stretch that is compared with what it should be


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
        """Call a method of this worker's `Shard`: first of all `draw`, with the directory of what is trained."""
        if not hasattr(self, "_estune_shard"):
            self._estune_shard = AdapterShard(self) if is_adapter(args[0]) else ModelShard(self)
        return self._estune_shard.call(method, *args)


class ModelShard(Shard):
    """The model's own weights, as far as this worker holds them."""

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self._places: list[Place] = []
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the checkpoint's tensors
        self._members: OuterProducts | None = None

    def held(self) -> dict[str, Tensor]:
        """The model's parameters by vLLM's names."""
        return internals.live_tensors(self._worker)

    def parameters(self, opening: Opening) -> list[Parameter]:
        """The chosen tensors' rectangles."""
        return [
            Parameter(place.name, self._live(place), opening.chosen[place.name], place.part, counts)
            for place, counts in zip(self._places, opening.counted[self._rank], strict=True)
            if place.name in opening.chosen
        ]

    def draw(self, path: Path) -> tuple[int, list[Place]]:
        """This worker's rank, and the map of its tensors, which hold the same as before afterwards.

        Raises:
            EstuneError: they are not rectangles of the checkpoint's tensors, used as they are.
        """
        why = internals.untrainable(self._worker)
        if why is not None:
            raise EstuneError(f"engine=vllm cannot train this model: {why}; use engine=transformers")
        checkpoint = Checkpoint(path)
        if self.weights is not None:  # they are drawn again, in a server that a run has left
            self.weights = None
            self._load(_stored(checkpoint))
        self._hold()
        before = self.digests()
        self._shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        self._places = draw_map(self._tensors, self._shapes, self._load)
        self._load(_stored(checkpoint))
        self._compare(before, "reloading the checkpoint")
        return self._rank, self._places

    def place_members(self, adapter: Path) -> None:
        """Find where members of low-rank noise go. vLLM must have filled all slots with this adapter of that rank.

        Raises:
            EstuneError: a matrix that is trained has no such place.
        """
        assert self.weights is not None
        rule = self.weights.rule
        drawn = {
            p.name: Drawn(rule.noise_key(p.name), self._shapes[p.name], rule.scales.get(p.name, 1.0), rule.rank)
            for p in self.weights.parameters
        }
        matrices = lora.matrices(self._shapes)
        beside = [
            (place, self._tensors[place.tensor])
            for place in self._places
            if place.name in drawn and place.name not in matrices
        ]
        device = next(iter(self._tensors.values())).device
        self._members = OuterProducts(self._worker, adapter, drawn, beside, device)

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make each slot, from the first on, a member's: what it adds to the live weights."""
        assert self._members is not None
        self._members.take(members, sigma)
        self._wait()

    def take_part(self, slot: int, member: Member, sigma: float, names: Collection[str]) -> None:
        """Make a slot a member's that adds to these tensors of the checkpoint alone."""
        assert self._members is not None
        self._members.take_part(slot, member, sigma, names)

    def slot_digests(self) -> dict[str, int]:
        """As `digests`, of the tensors of all slots."""
        return digests(lora.stacked(self._worker))

    def samples(self) -> list[Sample]:
        """The first, a middle and the last stretch of each part of a trained tensor, from the layers themselves."""
        now = self.held()
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
        now = self.held()
        return {name: as_array(t.cpu()).copy().reshape(t.shape) for name, t in now.items()}

    def matrices(self) -> list[str]:
        """vLLM's names of the tensors of two dimensions that are trained as a whole."""
        trained = {p.name for p in self.weights.parameters} if self.weights else set()
        held: dict[str, bool] = {}
        for place in self._places:
            held[place.tensor] = held.get(place.tensor, True) and place.name in trained
        return [name for name, whole in held.items() if whole and self._tensors[name].ndim == 2]

    def shake_all(self, member: Member, sigma: float) -> None:
        """Perturb all that is trained, around the base or, without one, from where it is."""
        assert self.weights is not None
        self.weights.storage.perturb(member.seed, member.sign * sigma)

    def shake_part(self, member: Member, sigma: float, names: Collection[str]) -> None:
        """As `shake_all`, these tensors of the checkpoint alone."""
        assert self.weights is not None
        part = self.weights.subset(lambda parameter: parameter.name in names)
        part.perturb(member.seed, member.sign * sigma)

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

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with lora.unwrapped(self._worker):
            internals.load(self._worker, tensors)

    def _check_addresses(self) -> None:
        super()._check_addresses()
        if self._members is not None:
            self._members.check()

    def _alone(self, name: str) -> Storage:
        assert self.weights is not None
        lie = {self._live(place).data_ptr() for place in self._places if place.tensor == name}
        return self.weights.subset(lambda parameter: parameter.tensor.data_ptr() in lie)

    def _live(self, place: Place) -> Tensor:
        return by_rows(self._tensors[place.tensor])[place.row : place.row + place.part.rows].view(-1)


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, file by file."""
    for file in dict.fromkeys(tensor.file for tensor in checkpoint.tensors.values()):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it cannot be iterated over
                yield name, opened.get_tensor(name)

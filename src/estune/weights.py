"""Live weights of an engine, and how they are perturbed, restored and updated exactly.

Three policies, by what is kept beside the live weights:

- `master`: a float32 base. live = round(base + sigma * noise), the update is float32 and loses nothing.
- `copy`: a base in the live type. Restoring is as exact; the update is summed in float32 and rounded once.
- `inplace`: nothing, as in the paper. Restoring subtracts the noise again, and what rounding leaves behind stays.

Every element's result depends on its own history alone, so any split gives the same bits, on the CPU and on a device
(`storage.py`). Storage addresses of live weights never change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from estune.checkpoint import DTYPES, RUN_LENGTH, Checkpoint, narrow, widen
from estune.errors import EstuneError
from estune.noise.reference import tensor_id
from estune.shared import Share
from estune.storage import CpuStorage, Run, as_array, flat, make_base, open_storage, share_of, type_name
from estune.strategy import Member, Update

if TYPE_CHECKING:
    from torch import Tensor, nn

Policy = Literal["master", "copy", "inplace"]
Rounding = Literal["nearest", "stochastic"]
NoiseMode = Literal["iid", "correlated"]
Array = npt.NDArray[Any]

SAMPLE = 4096  # elements of each tensor watched for drift


@dataclass(frozen=True)
class Parameter:
    """A trained tensor of a model: the checkpoint tensor `name`, whole and row-major.

    `aliases` are further names under which the checkpoint stores the same (tied) tensor.
    """

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """What in-place restoring left behind since the last update, over a sample of the weights."""

    changed: float  # fraction of weights that are not what they were
    rms: float  # root mean square of the difference


class Weights:
    """The trained parameters of one model, perturbed around a base.

    Args:
        parameters: from `trained_parameters`.
        policy, rounding: see the module's text; stochastic rounding matters to bfloat16 bases only.
        noise: `iid`, or `correlated`, which gives equal noise to all tensors, as the authors' first code did.
        threads: CPU threads to spread the work over.
        base_on_host: keep the base of weights on a device in pinned host memory.
        share: have the base of weights on the CPU in common with other processes, each of which updates a share.

    Raises:
        EstuneError: for a weight type or device without kernels, and, unless the policy is `master`, for types mixed.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        policy: Policy = "master",
        rounding: Rounding = "nearest",
        noise: NoiseMode = "iid",
        threads: int = 1,
        base_on_host: bool = False,
        share: Share | None = None,
    ) -> None:
        self.policy, self.rounding, self.noise = policy, rounding, noise
        self.parameters = list(parameters)
        live = [flat(p.tensor) for p in self.parameters]
        types = {t.dtype for t in live}
        if policy != "master" and len(types) > 1:
            names = " and ".join(sorted(map(type_name, types)))
            raise EstuneError(f"weights={policy} keeps weights of one type, the model has {names}; set weights=master")
        dtype = torch.float32 if policy == "master" else None
        base = live if policy == "inplace" else make_base(live, dtype, on_host=base_on_host, share=share)
        self._base = {p.name: t for p, t in zip(self.parameters, base, strict=True)}
        keys = [tensor_id(name) for name in self._base]
        runs = [Run(a, b, key, 0 if noise == "correlated" else key) for a, b, key in zip(live, base, keys, strict=True)]
        self._storage = open_storage(runs, threads)
        self._updated = self._storage if share is None else CpuStorage(share_of(runs, share), threads)
        self._fills = share is None or share.fills
        self._member: tuple[Member, float] | None = None  # what the live weights are perturbed by, if in place
        self._watched = self._sample() if policy == "inplace" else []

    @property
    def base(self) -> dict[str, Array]:
        """The base by checkpoint name, as flat arrays: its own memory, or a copy of what lies on a device."""
        return {name: as_array(tensor.cpu()) for name, tensor in self._base.items()}

    @property
    def dtype(self) -> str:
        """Type of the base weights: float32, bfloat16 or float16."""
        return type_name(next(iter(self._base.values())).dtype)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        if self.policy == "inplace":
            self.restore()
            self._member = (member, sigma)
        self._storage.perturb(member.seed, member.sign * sigma)

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy is `inplace`."""
        if self.policy != "inplace":
            self._storage.restore()
        elif self._member is not None:
            (member, sigma), self._member = self._member, None
            self._storage.perturb(member.seed, -member.sign * sigma)

    def apply(self, update: Update) -> None:
        """Add an update to the base, or to its share. The live weights follow at the next `perturb` or `restore`."""
        if self.policy == "inplace":
            self.restore()
        self._updated.update(update, self.rounding)
        if self.policy == "inplace":
            self._watched = self._sample()

    def fingerprint(self) -> str:
        """Hash of the base weights, 16 hexadecimal digits: equal bits, equal fingerprint, however they are split."""
        if self.policy == "inplace":
            self.restore()
        return as_fingerprint(self._storage.fingerprint())

    def share_sum(self) -> int:
        """Sum of the hashes of what `apply` updates: over all shares they add up to the fingerprint."""
        if self.policy == "inplace":
            self.restore()
        return self._updated.fingerprint()

    def drift(self) -> Drift:
        """How far the live weights of the `inplace` policy have drifted since the last update."""
        self.restore()
        pairs = [(widen(now), widen(then)) for now, then in zip(self._sample(), self._watched, strict=True)]
        difference = np.concatenate([now - then for now, then in pairs]) if pairs else np.zeros(1, np.float32)
        return Drift(float(np.mean(difference != 0)), float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))))

    def runs(self) -> dict[str, Callable[[], Iterator[Array]]]:
        """The base by checkpoint name, tied names included, as `Checkpoint.write` takes it."""

        def reader(tensor: Tensor) -> Callable[[], Iterator[Array]]:
            return lambda: (as_array(part.cpu()) for part in torch.split(tensor, RUN_LENGTH))

        return {name: reader(self._base[p.name]) for p in self.parameters for name in (p.name, *p.aliases)}

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved.

        A shared base is filled by one for all; for the others this does nothing.
        """
        if not self._fills:
            return
        for name, tensor in self._base.items():
            for i in range(0, len(tensor), RUN_LENGTH):
                part = tensor[i : i + RUN_LENGTH]
                values = narrow(checkpoint.tensors[name].read(i, len(part)), DTYPES[self.dtype])
                part.copy_(torch.from_numpy(values).view(tensor.dtype))

    def _sample(self) -> list[Array]:
        return [as_array(t[:: max(1, len(t) // SAMPLE)].clone().cpu()) for t in self._base.values()]


def as_fingerprint(total: int) -> str:
    """The fingerprint that a sum of element hashes stands for."""
    return f"{total % 2**64:016x}"


def trained_parameters(model: nn.Module, names: Collection[str], pattern: str = "*") -> list[Parameter]:
    """The model's parameters under their checkpoint names, tied tensors once.

    Args:
        model: a transformers model.
        names: the tensors of its checkpoint.
        pattern: shell-style pattern of the names to train.

    Raises:
        EstuneError: where a parameter is not one tensor of the checkpoint, or the pattern fits none.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    by_storage: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        bare = name.removeprefix(prefix)
        found = next((n for n in (name, bare, prefix + name) if n in names), None)
        stored = by_storage.setdefault(tensor.data_ptr(), (tensor, []))[1]
        if found is not None and found not in stored:
            stored.append(found)
    missing = [n for n, t in model.named_parameters() if not by_storage[t.data_ptr()][1]]
    if missing:
        raise EstuneError(
            f"{len(missing)} parameters are not tensors of the checkpoint, the first is {missing[0]}: "
            "architectures that merge tensors on loading are not supported yet"
        )
    chosen = [
        Parameter(stored[0], tensor, tuple(stored[1:]))
        for tensor, stored in by_storage.values()
        if fnmatchcase(stored[0], pattern)
    ]
    if not chosen:
        raise EstuneError(f"no parameter's name fits the pattern {pattern!r}; names look like {next(iter(names))}")
    return chosen

"""Live weights of an engine, and how they are perturbed, restored and updated exactly.

Three policies, by what is kept beside the live weights:

- `master`: a float32 base. live = round(base + sigma * noise), the update is float32 and loses nothing.
- `copy`: a base in the live type. Restoring is as exact; the update is summed in float32 and rounded once.
- `inplace`: nothing, as in the paper. Restoring subtracts the noise again, and what rounding leaves behind stays.

Every element's result depends on its own history alone, so any split over threads gives the same bits. Storage
addresses of live weights never change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from estune.checkpoint import RUN_LENGTH, Checkpoint, narrow, widen
from estune.errors import EstuneError
from estune.noise.reference import tensor_id
from estune.strategy import Member, Update
from estune.update import update_kernel

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


@dataclass(frozen=True, slots=True)
class _Run:
    """A stretch of one parameter: the unit of work of a kernel call."""

    live: Array
    base: Array
    tensor: int
    start: int


class Weights:
    """The trained parameters of one model, perturbed around a base.

    Args:
        parameters: from `trained_parameters`.
        policy, rounding: see the module's text; stochastic rounding matters to bfloat16 bases only.
        noise: `iid`, or `correlated`, which gives equal noise to all tensors, as the authors' first code did.
        threads: CPU threads to spread the work over.

    Raises:
        EstuneError: for a weight type or device without kernels.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        policy: Policy = "master",
        rounding: Rounding = "nearest",
        noise: NoiseMode = "iid",
        threads: int = 1,
    ) -> None:
        self.policy, self.rounding, self.noise = policy, rounding, noise
        self.parameters = list(parameters)
        live = {p.name: as_array(p.tensor) for p in self.parameters}
        self.base: dict[str, Array]
        if policy == "inplace":
            self.base = live
        else:
            dtype = torch.float32 if policy == "master" else None
            self.base = {p.name: as_array(p.tensor.detach().to(dtype, copy=True)) for p in self.parameters}
        self._runs = [
            _Run(a[i : i + RUN_LENGTH], self.base[name][i : i + RUN_LENGTH], key, i)
            for name, a in live.items()
            for key in [0 if noise == "correlated" else tensor_id(name)]
            for i in range(0, a.size, RUN_LENGTH)
        ]
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._member: tuple[Member, float] | None = None  # what the live weights are perturbed by, if in place
        self._watched = self._sample() if policy == "inplace" else []

    @property
    def dtype(self) -> str:
        """Type of the base weights: float32 or bfloat16."""
        return "bfloat16" if any(a.dtype == np.uint16 for a in self.base.values()) else "float32"

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        from estune.noise import cpu

        if self.policy == "inplace":
            self.restore()
            self._member = (member, sigma)
        self._each(lambda r: cpu.perturb(r.live, r.base, member.seed, r.tensor, r.start, member.sign * sigma))

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy is `inplace`."""
        from estune.noise import cpu

        if self.policy != "inplace":
            self._each(_copy_base)
        elif self._member is not None:
            (member, sigma), self._member = self._member, None
            self._each(lambda r: cpu.perturb(r.live, r.base, member.seed, r.tensor, r.start, -member.sign * sigma))

    def apply(self, update: Update) -> None:
        """Add an update to the base. The live weights follow at the next `perturb` or `restore`."""
        if self.policy == "inplace":
            self.restore()
        apply = update_kernel(update, self.rounding)
        self._each(lambda r: apply(r.base, r.tensor, r.start))
        if self.policy == "inplace":
            self._watched = self._sample()

    def fingerprint(self) -> str:
        """Hash of the base weights, 16 hexadecimal digits: equal bits, equal fingerprint, however they are split."""
        from estune.noise import cpu

        if self.policy == "inplace":
            self.restore()
        keys = {name: tensor_id(name) for name in self.base}
        sums = (cpu.fingerprint(a, keys[name], 0) for name, a in self.base.items())
        return f"{sum(sums) % 2**64:016x}"

    def drift(self) -> Drift:
        """How far the live weights of the `inplace` policy have drifted since the last update."""
        self.restore()
        pairs = [(_widen(now), _widen(then)) for now, then in zip(self._sample(), self._watched, strict=True)]
        difference = np.concatenate([now - then for now, then in pairs]) if pairs else np.zeros(1, np.float32)
        return Drift(float(np.mean(difference != 0)), float(np.sqrt(np.mean(np.square(difference, dtype=np.float64)))))

    def runs(self) -> dict[str, Callable[[], Iterator[Array]]]:
        """The base by checkpoint name, tied names included, as `Checkpoint.write` takes it."""

        def reader(array: Array) -> Callable[[], Iterator[Array]]:
            return lambda: (array[i : i + RUN_LENGTH] for i in range(0, array.size, RUN_LENGTH))

        return {name: reader(self.base[p.name]) for p in self.parameters for name in (p.name, *p.aliases)}

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved."""
        for name, array in self.base.items():
            for i in range(0, array.size, RUN_LENGTH):
                values = checkpoint.tensors[name].read(i, min(RUN_LENGTH, array.size - i))
                array[i : i + RUN_LENGTH] = narrow(values, "BF16") if array.dtype == np.uint16 else values

    def _sample(self) -> list[Array]:
        return [a[:: max(1, a.size // SAMPLE)].copy() for a in self.base.values()]

    def _each(self, work: Callable[[_Run], None]) -> None:
        if self._threads is None:
            for run in self._runs:
                work(run)
        else:
            list(self._threads.map(work, self._runs))


def as_array(tensor: Tensor) -> Array:
    """The tensor's own memory as a flat array: float32, or bfloat16's bits as uint16."""
    if tensor.device.type != "cpu":
        raise EstuneError(f"weights on {tensor.device}: perturbation runs on the CPU in this version; set device=cpu")
    if not tensor.is_contiguous():
        raise EstuneError(f"a weight of shape {tuple(tensor.shape)} is not contiguous: save and load the model again")
    flat = tensor.detach().view(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    if flat.dtype == torch.float32:
        return flat.numpy()
    raise EstuneError(f"weights of type {flat.dtype}: the CPU has kernels for float32 and bfloat16; set dtype to one")


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


def _copy_base(run: _Run) -> None:
    if run.live.dtype == run.base.dtype:
        np.copyto(run.live, run.base)
    else:
        np.copyto(run.live, narrow(run.base, "BF16"))


def _widen(stored: Array) -> npt.NDArray[np.float32]:
    return widen(stored, "BF16") if stored.dtype == np.uint16 else stored

"""Live weights of an engine, and how they are perturbed, restored and updated exactly.

The policy says what is kept beside them (`policies.py`). Every element's result depends on its own history alone, so
any split gives the same bits, on the CPU and on a device (`storage.py`). Storage addresses of live weights never
change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch

from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.noise.reference import tensor_id
from estune.noise.rows import Run
from estune.weights.base import Share, make_base, share_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import on_this_stream
from estune.weights.moments import MomentTensors
from estune.weights.parameters import Parameter, own_parameters
from estune.weights.places import put_together, stretches
from estune.weights.policies import POLICIES, NoiseMode, Perturbation, PolicyName, Rounding, Rule
from estune.weights.split import SplitBase, whole
from estune.weights.storage import CpuStorage, Storage, as_array, flat, open_storage, sums_of_squares, type_name
from estune.weights.tensors import DTYPES, RUN_LENGTH, convert, widen
from estune.weights.trained import Array, Drift, Runs, as_drift, as_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

SAMPLE = 4096  # elements of each tensor watched for drift


class Weights:
    """The trained parameters of one model, perturbed around a base.

    Args:
        parameters: from `trained_parameters`, or rectangles of checkpoint tensors.
        policy: what is kept beside the live weights (`policies.py`): `master`, `copy`, `inplace`, `exact_inplace`
            or `split_master`.
        rounding: of updates, `nearest` or `stochastic`, which matters to bfloat16 bases only.
        noise: `iid`; `correlated`, which gives equal noise to all tensors, as the authors' first code did; or `rank1`,
            `rank2`, `rank4` or `rank8`, which make a matrix' noise a sum of so many outer products
            (`noise/low_rank.py`).
        scales: factors of tensors' noise, in perturbations and updates, by checkpoint name, float32 values; others
            have 1.
        threads: CPU threads to spread the work over.
        base_on_host: keep the base of weights on a device in pinned host memory.
        share: share the base of weights on the CPU with other processes, each of which updates its part.

    Raises:
        EstuneError: for a weight type or device without kernels, unless the policy is `master`, for mixed types, and
            with `split_master` for others than bfloat16.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        policy: PolicyName = "master",
        rounding: Rounding = "nearest",
        noise: NoiseMode = "iid",
        scales: Mapping[str, float] | None = None,
        threads: int = 1,
        base_on_host: bool = False,
        share: Share | None = None,
    ) -> None:
        self.parameters = list(parameters)
        live = [flat(p.tensor) for p in self.parameters]
        self._policy = POLICIES[policy]
        types = sorted({type_name(t.dtype) for t in live})
        if (why := self._policy.unfit(types)) is not None:
            raise EstuneError(why)
        self.rule = Rule(policy, rounding, noise, self._policy.dtype(types[0]), scales or {})
        """How the base is kept and changed."""
        self._base: list[Any] = live  # tensors, or each a `SplitBase`
        if self._policy.splits_base:
            self._base = [SplitBase.of(t, RUN_LENGTH) for t in live]
        elif self._policy.keeps_base:
            self._base = make_base(live, getattr(torch, self.rule.dtype), on_host=base_on_host, share=share)
        self._runs = [self._run(p, a, b) for p, a, b in zip(self.parameters, live, self._base, strict=True)]
        self._threads = threads
        self.storage = open_storage(self._runs, threads)
        self._updated = self.storage if share is None else CpuStorage(share_of(self._runs, share), threads)
        self._share = share
        self._moments: MomentTensors | None = None  # once an update is scaled by them
        self._kept: dict[str, list[Tensor]] = {}  # copies of the base, by name
        self._perturbed: Perturbation | None = None  # what the live weights are perturbed by
        self._watch()

    @classmethod
    def of(cls, module: nn.Module, **options: Any) -> Self:
        """All parameters of any PyTorch module; `options` are those of the class."""
        return cls(own_parameters(module), **options)

    def _run(self, parameter: Parameter, live: Tensor, base: Any) -> Run:
        part = parameter.part
        noise = self.rule.noise_key(parameter.name)
        columns = self.rule.noise_columns(parameter.columns or part.pitch)
        scale = self.rule.scales.get(parameter.name, 1.0)
        key = tensor_id(parameter.name)
        rank = self.rule.rank
        return Run(live, base, key, noise, part.start, part.layout, parameter.counted, columns, rank, scale)

    @property
    def base(self) -> dict[str, Array]:
        """The base of whole tensors by name, `[elements]` each: its own memory, or a copy.

        It is a copy of what lies on a device, or in halves.
        """
        self._settle()
        return {p.name: as_array(t.cpu()) for p, t in zip(self.parameters, self._base, strict=True)}

    @property
    def tensors(self) -> dict[str, list[str]]:
        """The trained tensors by checkpoint name, each with the names tied to it."""
        return {p.name: list(p.aliases) for p in self.parameters}

    @property
    def elements(self) -> int:
        """Elements of all trained tensors, as far as they are counted here."""
        return sum(p.tensor.numel() for p in self.parameters if p.counted)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        self._settle()
        self.refuse_low_rank()
        self._policy.perturb(self.storage, (member, sigma))
        self._perturbed = member, sigma

    def refuse_low_rank(self) -> None:
        """Refuse members of low rank, where these weights could not take them back to the bit."""
        if not self.storage.reverses_low_rank and any(run.columns for run in self._runs):
            self._policy.refuse_low_rank()

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy drifts."""
        self._policy.restore(self.storage, self._perturbed)
        self._perturbed = None

    def apply(self, update: Update) -> None:
        """Add an update to the base, or to its share. The live weights follow at the next `perturb` or `restore`."""
        self._settle()
        if update.moments is None:
            self._updated.update(update, self.rule.rounding)
        else:
            assert self._share is None  # moments beside a share of a base would be lost with its process
            self._moments = self._moments or MomentTensors(self._runs, self._threads)
            self._moments.apply(update)
        self._watch()

    def anchor(self, checkpoint: Checkpoint, update: Update) -> None:
        """Bring the base, or its share of it, as far toward a checkpoint's tensors as an update says.

        One rounded operation after the other, as `cpu_anchor.pull` says: the same bits everywhere.
        """
        from estune.noise import cpu_anchor

        self._settle()
        total = sum(len(base) for base in self._base)
        first, end = (0, total) if self._share is None else self._share.stretch(total)
        mine = []
        offset = 0
        for p, base in zip(self.parameters, self._base, strict=True):
            mine.append((p, base, range(max(first - offset, 0), min(end - offset, len(base)))))
            offset += len(base)

        def pull(base: Any, read: Callable[[], Array]) -> None:
            now = whole(base)
            if now.device.type == "cpu":
                cpu_anchor.pull(as_array(now), read(), update.anchor, update.anchor_l1)
            else:
                origin = torch.from_numpy(widen(read())).to(now.device)
                if update.anchor:
                    now.add_((origin - now).mul_(update.anchor))
                if update.anchor_l1:
                    now.add_((origin - now).clamp_(-update.anchor_l1, update.anchor_l1))
            if now is not base:
                base.copy_(now)

        self._each_stretch(mine, checkpoint, pull)

    def fingerprint(self) -> str:
        """Hash of the base weights, 16 hexadecimal digits: equal bits, equal fingerprint, however they are split."""
        self._settle()
        return as_fingerprint(self.storage.fingerprint())

    def share_sum(self) -> int:
        """Sum of the hashes of what `apply` updates: over all shares they add up to the fingerprint."""
        self._settle()
        return self._updated.fingerprint()

    def drift(self) -> Drift | None:
        """How far the weights have drifted since the last update; None where the policy does not drift."""
        return as_drift([self.drift_sums()]) if self._policy.drifts else None

    def drift_sums(self) -> tuple[int, int, float]:
        """What `drift` is made of: how many weights are watched, how many of them changed, and the sum of squares."""
        self.restore()
        pairs = [
            (widen(now), widen(then))
            for p, now, then in zip(self.parameters, self._sample(), self._watched, strict=True)
            if p.counted
        ]
        difference = np.concatenate([now - then for now, then in pairs]) if pairs else np.zeros(0, np.float32)
        return len(difference), int(np.sum(difference != 0)), float(np.sum(np.square(difference, dtype=np.float64)))

    def runs(self) -> Runs:
        """The base of whole tensors by checkpoint name, tied names included, as `Checkpoint.write` takes it."""
        self._settle()
        held: dict[str, list[tuple[Parameter, Any]]] = {}
        for p, base in zip(self.parameters, self._base, strict=True):
            held.setdefault(p.name, []).append((p, base))

        def reader(parts: list[tuple[Parameter, Any]]) -> Callable[[], Iterator[Array]]:
            return lambda: (as_array(run.cpu()) for run in put_together(parts).split(RUN_LENGTH))

        return {name: reader(parts) for parts in held.values() for name in (parts[0][0].name, *parts[0][0].aliases)}

    def rows(self, name: str, first: int, count: int) -> list[tuple[int, int, Array]]:
        """The parts of `count` rows of a tensor's base, from row `first` on, that are counted here.

        Returns:
            Of each part its first row, its first column and its elements, `[rows, columns]`.
        """
        self._settle()
        found = []
        for p, base in zip(self.parameters, self._base, strict=True):
            part = p.part
            start = max(first, part.row)
            end = min(first + count, part.row + part.rows)
            if p.name == name and p.counted and start < end:
                held = base[(start - part.row) * part.width : (end - part.row) * part.width]
                found.append((start, part.column, as_array(held.cpu()).reshape(-1, part.width)))
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved.

        A shared base is filled by one replica for all; for the others this does nothing.
        """
        if self._share is not None and not self._share.fills:
            return
        self._moments = None  # no part of checkpoints
        self._fill(self._base, checkpoint)
        if not self._policy.keeps_base:
            self._perturbed = None
        self._watch()

    def keep(self, name: str, most: int) -> None:
        """Keep a copy of the base in host memory under a name that no other base has; so many at most, the latest."""
        self._settle()
        copy = self._kept.pop(name, None)
        while self._kept and len(self._kept) >= most:
            del self._kept[next(iter(self._kept))]
        if most > 0:
            self._kept[name] = copy or [whole(base).to("cpu", copy=True) for base in self._base]

    def bring(self, name: str) -> bool:
        """Make the copy of this name the base; return whether there is one."""
        self._settle()
        for base, kept in zip(self._base, self._kept.get(name, []), strict=False):
            base.copy_(kept)
            self._moments = None
        self._watch()
        return name in self._kept

    def show(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the live weights, rounded to their type, until the next `perturb` or `restore`.

        Only where a base is kept: otherwise there is nothing to restore from.
        """
        self._fill([flat(p.tensor) for p in self.parameters], checkpoint)

    def change(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """Norm of the base's difference from a checkpoint in the base's type, and of the checkpoint's tensors."""
        return as_norms([self.change_sums(checkpoint)])

    def change_sums(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """What `change` is made of: sums of squares over the elements counted here.

        They are the same for any number of threads, on the CPU and on a device: blocks have one order of summation
        (`noise/cpu_sums.py`, `squares`), and the sum of the blocks is rounded once.
        """
        dtype = DTYPES[self.rule.dtype]
        widens = dtype == "F32"  # kernels widen by themselves

        def squares(base: Any, read: Callable[[], Array]) -> Array:
            stored = read()
            return sums_of_squares(whole(base), stored if widens else convert(stored, dtype))

        self._settle()
        counted = [
            (p, base, range(len(base))) for p, base in zip(self.parameters, self._base, strict=True) if p.counted
        ]
        sums = np.concatenate([np.zeros((0, 2)), *self._each_stretch(counted, checkpoint, squares)])
        return math.fsum(sums[:, 0]), math.fsum(sums[:, 1])

    def subset(self, choose: Callable[[Parameter], bool]) -> Storage:
        """Storage of the chosen parameters alone, for passes over them."""
        chosen = [run for p, run in zip(self.parameters, self._runs, strict=True) if choose(p)]
        return open_storage(chosen, self._threads)

    def _fill(self, targets: Sequence[Any], checkpoint: Checkpoint) -> None:
        """Copy a checkpoint's tensors to these, one for each parameter, rounded to their types."""

        def copy(target: Any, read: Callable[[], Array]) -> None:
            stored = convert(read(), DTYPES[type_name(target.dtype)])
            target.copy_(torch.from_numpy(stored).view(target.dtype))

        whole = [(p, target, range(len(target))) for p, target in zip(self.parameters, targets, strict=True)]
        self._each_stretch(whole, checkpoint, copy)

    def _each_stretch(
        self,
        tensors: Sequence[tuple[Parameter, Any, range]],
        checkpoint: Checkpoint,
        work: Callable[[Any, Callable[[], Array]], T],
    ) -> list[T]:
        """Do work on each stretch of the tensors, as far as it lies within a range of elements; the results, in order.

        Args:
            tensors: parameters, each with a flat tensor or base `[elements]` and the range of its elements that counts.
            checkpoint: where their elements are read.
            work: called with a stretch, `[elements]`, and a function that reads the checkpoint's elements there.
        """
        found = [
            (tensor[max(first, of.start) : min(end, of.stop)], _part_of(read, first, of))
            for p, tensor, of in tensors
            for first, end, read in stretches(checkpoint.tensors[p.name].stored, p.part)
            if max(first, of.start) < min(end, of.stop)
        ]
        if not found:
            return []

        def on_stretch(stretch: tuple[Any, Callable[[], Array]]) -> T:
            return work(*stretch)

        if self._threads == 1:
            return list(map(on_stretch, found))
        each = on_this_stream(found[0][0].device, on_stretch)
        with ThreadPoolExecutor(self._threads) as threads:
            return list(threads.map(each, found))

    def _settle(self) -> None:
        """Restore live weights that are their own base, so that the base can be read or changed."""
        if not self._policy.keeps_base:
            self.restore()

    def _watch(self) -> None:
        """Remember a sample of the weights, to tell later how far they have drifted."""
        self._watched = self._sample() if self._policy.drifts else []

    def _sample(self) -> list[Array]:
        return [as_array(t[:: max(1, len(t) // SAMPLE)].clone().cpu()) for t in self._base]


def _part_of(read: Callable[[], Array], first: int, of: range) -> Callable[[], Array]:
    """What reads those elements of a stretch, which begins at `first`, that lie within a range."""
    return lambda: read()[max(of.start - first, 0) : of.stop - first]

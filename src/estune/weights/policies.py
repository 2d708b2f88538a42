"""What is kept beside the live weights, and how they come back from a member: one small class for each policy.

- `Master` keeps a float32 base. live = round(base + sigma * noise); the update is in float32 and loses nothing.
- `Copy` keeps a base in the live type. Restoring is as exact; the update is summed in float32 and rounded once.
- `InPlace` keeps nothing, as in the paper. Restoring subtracts the noise again, and rounding errors stay.
- `ExactInPlace` keeps what that would not give back, some percent of the weights. Restoring is exact, updates are
  `Copy`'s.
- `SplitMaster` keeps of `Master`'s base what bfloat16 weights lack of it, its lower half, and restores as
  `ExactInPlace` does. All bits are `Master`'s.
- `Int8` and `Int4` keep nothing: the weights are integers, to which whole numbers are added (`integers.py`).

The names of policies, rounding modes, noise and types stand here alone, for settings, journals and estimates. No torch
is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.es.update import along
from estune.noise.reference import tensor_id
from estune.weights.grid import Grid

if TYPE_CHECKING:
    from estune.weights.storage import Storage

PolicyName = Literal["master", "copy", "inplace", "exact_inplace", "split_master", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
NoiseMode = Literal["iid", "correlated", "rank1", "rank2", "rank4", "rank8"]
"""`correlated` gives equal noise to all tensors, as the authors' first code did; `rank1` makes a matrix' noise an outer
product of two vectors (EGGROLL), and the others the sum of as many."""
DType = Literal["float32", "bfloat16", "float16"]

TYPE_NAMES: tuple[DType, ...] = get_args(DType)
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by the type's name."""

PATCHED = 1 / 8
"""Bytes of patches for each byte of weights, at most, up to a sigma of a seventh of the weights' spread.

At the paper's sigma, a twentieth of a usual spread, it is about half of that (`bench/exactness/in_place.py`).
"""

Perturbation = tuple[Member, float]
"""A member and its sigma."""


def rank_of(noise: str) -> int:
    """Outer products that a matrix' noise is the sum of, by a `NoiseMode` or `auto`; 0 where it is of no low rank."""
    return int(noise.removeprefix("rank")) if noise.startswith("rank") else 0


def _all(types: Sequence[str]) -> str:
    return " and ".join(types)


class Policy:
    """What `Master` and `Copy` share: a base is kept, and copied back. They have no state: one serves all weights."""

    name: ClassVar[PolicyName]
    keeps_base: ClassVar[bool] = True
    """Whether the base is kept beside the live weights; otherwise they are it."""
    twin: ClassVar[PolicyName | None] = None
    """Where members are perturbed in place and taken back to the bit: the policy that keeps a base and has all bits."""
    splits_base: ClassVar[bool] = False
    """Whether the live weights, in bfloat16, are half of a float32 base, and the other half is kept."""
    drifts: ClassVar[bool] = False
    """Whether restoring leaves something behind, which then is part of the run."""
    base_dtype: ClassVar[DType | None] = None
    """Type of the base; None where it is that of the live weights, which must then be of one type."""
    bits: ClassVar[int] = 0
    """Of a weight, where weights are integers."""

    def dtype(self, live: str) -> str:
        """Type of the base of live weights of a type."""
        return self.base_dtype or live

    def base_bytes(self, elements: int, live: str) -> int:
        """Bytes kept beside so many live weights of a type."""
        return elements * BYTES[self.dtype(live)] if self.keeps_base else 0

    def unfit(self, types: Sequence[str]) -> str | None:
        """Why live weights of these types, all that there are, cannot be kept so; None where they can."""
        if self.base_dtype is None and len(types) > 1:
            return f"weights={self.name} keeps weights of one type, the model has {_all(types)}; set weights=master"
        return None

    def refuse_low_rank(self) -> None:
        """Refuse to perturb by noise of low rank on a device, for whose patches there are no kernels there.

        Raises:
            EstuneError: always, where the policy takes members back.
        """
        if self.twin is not None:
            raise EstuneError(
                f"weights={self.name} can take noise of low rank on a GPU where members are decoded together, which "
                f"this model, or rollouts of several turns, do not permit: set weights={self.twin} or noise=iid"
            )

    def grid(self, group_size: int, carry_steps: int) -> Grid | None:
        """The grid of integer weights; None where they are none."""
        return Grid(self.bits, group_size, carry_steps) if self.bits else None

    def perturb(self, storage: Storage, perturbation: Perturbation) -> None:
        """Perturb the live weights, which no member perturbs if they are the base."""
        member, sigma = perturbation
        if member.along:
            storage.perturb_along(along(member, sigma))
        else:
            storage.perturb(member.seed, member.sign * sigma)

    def restore(self, storage: Storage, perturbed: Perturbation | None) -> None:
        """Make the live weights the base again.

        Args:
            storage: where they are.
            perturbed: what they are perturbed by, if anything.
        """
        storage.restore()


class Master(Policy):
    """Keeps a float32 base."""

    name = "master"
    base_dtype = "float32"


class Copy(Policy):
    """Keeps a base in the type of the live weights."""

    name = "copy"


class InPlace(Policy):
    """Keeps nothing: the live weights are the base, and what perturbs them is subtracted again."""

    name = "inplace"
    keeps_base = False
    drifts = True

    def restore(self, storage: Storage, perturbed: Perturbation | None) -> None:
        """Subtract the noise of the member that the live weights are perturbed by, if there is one."""
        if perturbed is not None:
            member, sigma = perturbed
            storage.perturb(member.seed, -member.sign * sigma)


class ExactInPlace(Policy):
    """Keeps no base: the live weights are it, and the patches of the member that perturbs them bring it back."""

    name: ClassVar[PolicyName] = "exact_inplace"
    keeps_base = False
    twin: ClassVar[PolicyName | None] = "copy"

    def base_bytes(self, elements: int, live: str) -> int:
        """Bytes of patches, as many as there may be: see `PATCHED`."""
        return int(elements * BYTES[live] * PATCHED)

    def perturb(self, storage: Storage, perturbation: Perturbation) -> None:
        """Perturb the live weights, and note what restoring needs."""
        member, sigma = perturbation
        storage.perturb_reversibly(member.seed, member.sign * sigma)

    def restore(self, storage: Storage, perturbed: Perturbation | None) -> None:
        """Take back the member that the live weights are perturbed by, if there is one, to the bit."""
        if perturbed is not None:
            member, sigma = perturbed
            storage.reverse(member.seed, member.sign * sigma)


class SplitMaster(ExactInPlace):
    """Keeps the lower half of a float32 base, of which live weights in bfloat16 are the upper half, rounded.

    As apex' "parameter remainders" and Intel's `split_master_weight_for_bf16`, which are there for optimizers.
    """

    name = "split_master"
    twin = "master"
    splits_base = True
    base_dtype = "float32"

    def base_bytes(self, elements: int, live: str) -> int:
        """Bytes of the lower halves and of patches."""
        return elements * BYTES["bfloat16"] + super().base_bytes(elements, live)

    def unfit(self, types: Sequence[str]) -> str | None:
        """As `Policy.unfit`: all but bfloat16."""
        if list(types) == ["bfloat16"]:
            return None
        same = "weights=exact_inplace, which in float32 has the same bits, or " if list(types) == ["float32"] else ""
        return (
            f"weights={self.name} is for weights that generate in bfloat16, not in {_all(types)}: set dtype=bfloat16, "
            f"or {same}weights=master"
        )


class Integers(Policy):
    """Keeps nothing: the weights are integers, which `IntegerWeights` perturbs and restores.

    To all others the base is what they stand for, in float32.
    """

    keeps_base = False
    base_dtype = "float32"


class Int8(Integers):
    """Integers of 8 bits."""

    name = "int8"
    bits = 8


class Int4(Integers):
    """Integers of 4 bits."""

    name = "int4"
    bits = 4


POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (Master(), Copy(), InPlace(), ExactInPlace(), SplitMaster(), Int8(), Int4())
}
"""By the name in settings and journals."""


def bits_of(policy: PolicyName) -> PolicyName:
    """The policy whose bits a run of this one has: another that keeps a base, or itself."""
    return POLICIES[policy].twin or policy


@dataclass(frozen=True, slots=True)
class Rule:
    """What decides the weights of a run to the bit, together with the base checkpoint and the steps."""

    policy: PolicyName
    rounding: Rounding  # of updates
    noise: NoiseMode
    dtype: str  # of the base weights
    scales: Mapping[str, float] = field(default_factory=dict)  # of a tensor's noise, by its name; others have 1
    grid: Grid | None = None  # of integer weights

    @property
    def how(self) -> Policy:
        """The policy itself."""
        return POLICIES[self.policy]

    def noise_key(self, tensor: str) -> int:
        """64-bit key of the noise of a checkpoint's tensor."""
        return 0 if self.noise == "correlated" else tensor_id(tensor)

    @property
    def rank(self) -> int:
        """Outer products that a matrix' noise is the sum of; 0 where each element has noise of its own."""
        return rank_of(self.noise)

    def noise_columns(self, columns: int) -> int:
        """The columns of a tensor whose noise is of low rank; 0 where each of its elements has its own."""
        return columns if self.rank and columns > 1 else 0

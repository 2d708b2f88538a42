"""Integer weights, trained as they are: full-parameter fine-tuning of a quantised model in the memory of inference.

The live weights are the codes and nothing is kept beside them (after QES, arXiv 2602.03120, which does so with GPTQ's
weights). A member moves each code by a whole number of steps of the grid, and is moved back. What an update wants is
seldom whole: the rest is carried on to the next update, and it need not be kept, as it is a function of seeds and
coefficients alone, which are at hand. It is computed again from the updates since the window of `carry_steps` updates
began, or kept, by the setting `carry`, with the same bits: 4 bytes a weight for half a window's noise an update.

What differs from the paper: its error shrinks by a tenth a step, so that steady updates of less than a twentieth of a
step of the grid never come to anything, and its window slides; ours is whole within a window and dropped at its end.
With rounding=stochastic the error of a window begins as a random number from -1/2 to 1/2, by which weights are what
updates want on average, however small these are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.noise.integers import Codes, Cuts, Floats, Levels, Steps
from estune.noise.reference import tensor_id
from estune.weights.checkpoint import Checkpoint
from estune.weights.coded import CodedTensor
from estune.weights.grid import Grid, GroupSize
from estune.weights.parameters import Parameter, fits, refuse_unfitting
from estune.weights.policies import PolicyName, Rounding, Rule
from estune.weights.tensors import RUN_LENGTH, Tensor
from estune.weights.trained import Array, Drift, Runs, as_norms

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """A trained matrix of a model: the checkpoint tensor `name`, as codes and scales that lie in the model.

    Attributes:
        name: the tensor's in the checkpoint.
        codes, scales: on the CPU, contiguous, row-major; codes int8, or uint8 that hold two each, scales float32.
        aliases: further names under which the checkpoint stores the same (tied) tensor.
    """

    name: str
    codes: torch.Tensor
    scales: torch.Tensor
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a matrix: whole groups, from element `start` on."""

    name: str
    key: int  # of the matrix, for noise and fingerprint
    start: int
    codes: Codes
    scales: Floats
    levels: Levels
    factor: float  # of the noise


class IntegerWeights:
    """The integer weights of one model, as `TrainedWeights`. To others their base is what they stand for, in float32.

    Args:
        matrices: what is trained, with room for codes and scales.
        checkpoint: which they come from, and which tells the scales.
        policy: `int8` or `int4`.
        grid: how they are integers.
        rounding: `nearest`, where the error of a window begins as 0, or `stochastic`.
        scales: factors of tensors' noise, by checkpoint name, float32 values; others have 1.
        threads: CPU threads to spread the work over.
        keep_error: keep what is carried on, 4 bytes a weight, instead of computing it again.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        checkpoint: Checkpoint,
        *,
        policy: PolicyName,
        grid: Grid,
        rounding: Rounding = "stochastic",
        scales: Mapping[str, float] | None = None,
        threads: int = 1,
        keep_error: bool = False,
    ) -> None:
        self.matrices = list(matrices)
        self.grid = grid
        self.rule = Rule(policy, rounding, "iid", "float32", scales or {}, grid)
        self._stretches = [
            stretch
            for matrix in matrices
            for stretch in self._split(matrix, grid.levels_of(checkpoint.tensors[matrix.name]))
        ]
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._errors = [np.empty(self._elements(s) if keep_error else 0, np.float32) for s in self._stretches]
        self._window: list[Update] = []  # updates since it began
        self._perturbed: tuple[Member, float] | None = None
        self._cuts: list[Cuts] = []  # of the member, by stretch
        self._each(lambda stretch, _: self._measure(stretch, checkpoint))

    @property
    def tensors(self) -> dict[str, list[str]]:
        """The trained tensors by checkpoint name, each with the names tied to it."""
        return {matrix.name: list(matrix.aliases) for matrix in self.matrices}

    @property
    def elements(self) -> int:
        """Elements of all trained tensors."""
        return sum(map(self._elements, self._stretches))

    def perturb(self, member: Member, sigma: float) -> None:
        """Move the codes by a member's steps. Needs no restore between members."""
        self.restore()
        self._cuts = self._shift(member, sigma, 1)
        self._perturbed = member, sigma

    def restore(self) -> None:
        """Take back the member that the codes are moved by, if there is one: exactly."""
        from estune.noise import cpu_integers

        if self._perturbed is not None:
            self._shift(*self._perturbed, -1)
            for stretch, cuts in zip(self._stretches, self._cuts, strict=True):
                cpu_integers.give_back(stretch.codes, cuts)
        self._perturbed = None

    def apply(self, update: Update) -> None:
        """Make an update, of which what cannot be made is carried on."""
        self.restore()
        if len(self._window) == self.grid.carry_steps:
            self._window = []
        self._window.append(update)

        def advance(stretch: Stretch, error: Floats) -> None:
            updates = self._window[-1:] if error.size else self._window
            make(updates, self.rule, stretch, error if error.size else None, fresh=updates[0] is self._window[0])

        self._each(advance)

    def anchor(self, checkpoint: Checkpoint, update: Update) -> None:
        """Settings refuse what this would be for."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of what the codes stand for, 16 hexadecimal digits, as that of weights in float32."""
        return as_fingerprint(self.share_sum())

    def share_sum(self) -> int:
        """Sum of the hashes of all weights."""
        from estune.noise import cpu_sums

        self.restore()
        return sum(self._each(lambda s, _: cpu_sums.fingerprint(self.grid.values(s.codes, s.scales), s.key, s.start)))

    def drift(self) -> Drift | None:
        """None: restoring leaves nothing behind."""
        return None

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base: the base model's, or what codes stood for where a window had ended.

        The scales stay.
        """
        self._perturbed = None
        self._window = []

        def read(stretch: Stretch, _: Floats) -> None:
            stretch.codes[:] = self.grid.pack(self._codes_of(stretch, checkpoint))

        self._each(read)

    def keep(self, name: str, most: int) -> None:
        """Only servers keep copies, which do not have integer weights."""
        raise NotImplementedError

    def bring(self, name: str) -> bool:
        """As `keep`."""
        raise NotImplementedError

    def show(self, checkpoint: Checkpoint) -> None:
        """As for other weights without a base, there is nothing to restore from."""
        raise NotImplementedError

    def change(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """Norm of the difference from a checkpoint's tensors on the grid, and of these."""

        def squares(stretch: Stretch, _: Floats) -> tuple[float, float]:
            now = self.grid.values(stretch.codes, stretch.scales).astype(np.float64)
            then = self.grid.values(self._codes_of(stretch, checkpoint), stretch.scales)
            return float(np.sum((now - then) ** 2)), float(np.sum(then.astype(np.float64) ** 2))

        self.restore()
        return as_norms(self._each(squares))

    def runs(self) -> Runs:
        """What the codes of whole tensors stand for, by checkpoint name, tied names included."""
        self.restore()
        held: dict[str, list[Stretch]] = {}
        for stretch in self._stretches:
            held.setdefault(stretch.name, []).append(stretch)

        def reader(parts: list[Stretch]) -> Callable[[], Iterator[Array]]:
            return lambda: (self.grid.values(part.codes, part.scales) for part in parts)

        return {name: reader(held[m.name]) for m in self.matrices for name in (m.name, *m.aliases)}

    def _split(self, matrix: Matrix, levels: Levels) -> Iterator[Stretch]:
        """A matrix in stretches of some `RUN_LENGTH` elements, views of its codes and scales."""
        codes = matrix.codes.detach().view(-1).numpy()
        scales = matrix.scales.detach().view(-1).numpy()
        key = tensor_id(matrix.name)
        factor = self.rule.scales.get(matrix.name, 1.0)
        groups = RUN_LENGTH // self.grid.group_size
        of_codes = RUN_LENGTH * codes.size // (scales.size * self.grid.group_size)
        for i in range(-(-scales.size // groups)):
            part = codes[i * of_codes : (i + 1) * of_codes]
            of_part = scales[i * groups : (i + 1) * groups]
            yield Stretch(matrix.name, key, i * RUN_LENGTH, part, of_part, levels, factor)

    def _elements(self, stretch: Stretch) -> int:
        return stretch.scales.size * self.grid.group_size

    def _measure(self, stretch: Stretch, checkpoint: Checkpoint) -> None:
        """Fill scales and codes by the checkpoint's weights."""
        laid = self.grid.laid(checkpoint.tensors[stretch.name], stretch.start, self._elements(stretch))
        stretch.scales[:] = laid.scales
        stretch.codes[:] = self.grid.pack(laid.codes)

    def _codes_of(self, stretch: Stretch, checkpoint: Checkpoint) -> Any:
        weights = checkpoint.tensors[stretch.name].read(stretch.start, self._elements(stretch))
        return self.grid.codes(weights, stretch.scales, stretch.levels)

    def _shift(self, member: Member, sigma: float, way: int) -> list[Cuts]:
        from estune.noise import cpu_integers

        def shift(s: Stretch, _: Floats) -> Cuts:
            sign = member.sign * way
            return cpu_integers.shift(s.codes, s.scales, member.seed, s.key, s.start, sigma * s.factor, sign, s.levels)

        return self._each(shift)

    def _each(self, work: Callable[[Stretch, Floats], T]) -> list[T]:
        """Do work on each stretch and its error, spread over the threads; return the results, in order."""
        each = map if self._threads is None else self._threads.map
        return list(each(work, self._stretches, self._errors))


def make(updates: Sequence[Update], rule: Rule, on: Stretch, error: Floats | None, *, fresh: bool) -> None:
    """Make the last of some updates to codes; arguments as of `cpu_integers.advance`."""
    from estune.noise import cpu_integers

    steps = Steps.of([(update.pairs, update.sigma) for update in updates], on.factor)
    dither = updates[0].rounding_seed if rule.rounding == "stochastic" else None
    cpu_integers.advance(
        on.codes, on.scales, steps, on.key, on.start, on.levels, error=error, fresh=fresh, dither_seed=dither
    )


def refuse_pattern(pattern: str, tensors: Mapping[str, Tensor], bits: int) -> None:
    """Refuse what `refuse_unfitting` does, and patterns that leave no matrix where integers are trained.

    Args:
        pattern: `train_parameters`.
        tensors: the checkpoint's, by name; where some are integers, others cannot become such.
        bits: of the integers that are trained; 0 where other weights are.

    Raises:
        EstuneError: naming it.
    """
    refuse_unfitting(pattern, tensors)
    coded = [name for name, tensor in tensors.items() if isinstance(tensor, CodedTensor)]
    matrices = coded or [name for name, tensor in tensors.items() if len(tensor.shape) > 1]
    if bits and not any(fits(name, pattern) for name in matrices):
        which = f"those that the checkpoint has as such, like {coded[0]}," if coded else "matrices"
        raise EstuneError(f"train_parameters: {pattern} leaves no matrix to train, and only {which} can be integers")


def quantised(parameters: Sequence[Parameter], checkpoint: Checkpoint, grid: Grid) -> list[Parameter]:
    """The parameters that a quantised checkpoint holds as integers; its others are left as they are.

    Raises:
        EstuneError: the grid's groups do not divide those of the checkpoint.
    """
    found = []
    for parameter in parameters:
        tensor = checkpoint.tensors[parameter.name]
        if isinstance(tensor, CodedTensor):
            sizes = [size for size in get_args(GroupSize) if tensor.group_size % size == 0]
            if sizes and tensor.group_size % grid.group_size:
                raise EstuneError(
                    f"model {checkpoint.path}: {tensor.group_size} neighbours share a scale, which weights_group_size "
                    f"{grid.group_size} does not divide: set weights_group_size={sizes[-1]}"
                )
            found.append(parameter)
    return found


def say_what_is_anew(weights: IntegerWeights, checkpoint: Checkpoint, model: str) -> None:
    """Log a warning of matrices that a checkpoint holds as integers of another kind, with how far they changed."""
    found = _laid_anew(weights, checkpoint)
    if found:
        log.warning(
            "model %s: %d of %d quantised matrices are no integers of %s times one scale for each %d neighbours, so "
            "that new ones were made: they change by %.2g%% of their norm in the mean, and %.2g%% at most",
            model,
            len(found),
            len(weights.matrices),
            weights.rule.policy,
            weights.grid.group_size,
            100 * sum(found.values()) / len(found),
            100 * max(found.values()),
        )


def _laid_anew(weights: IntegerWeights, checkpoint: Checkpoint) -> dict[str, float]:
    """The norm of each such matrix' change over its own."""
    found = {}
    for name, read in weights.runs().items():
        tensor = checkpoint.tensors[name]
        if isinstance(tensor, CodedTensor) and not weights.grid.has(tensor):
            sums = np.zeros(2)
            start = 0
            for now in read():
                then = tensor.read(start, now.size).astype(np.float64)
                sums += np.sum((now - then) ** 2), np.sum(then**2)
                start += now.size
            found[name] = float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0
    return found


def rebuilt(
    tensor: Tensor, start: int, count: int, updates: Sequence[Update], rule: Rule, seen: Callable[[int, Floats], object]
) -> Floats:
    """Some of a checkpoint's weights after updates, as `IntegerWeights` has them, whole groups of one matrix.

    Args:
        tensor: the base model's matrix.
        start, count: which of its elements.
        updates: all since the base model.
        rule: how weights are integers.
        seen: called as in `Steps.rebuilt`.
    """
    grid = rule.grid
    assert grid is not None
    name = tensor.name
    codes, scales = grid.laid(tensor, start, count)
    error = np.empty(count, np.float32)
    on = Stretch(name, tensor_id(name), start, codes, scales, grid.levels_of(tensor), rule.scales.get(name, 1.0))
    found = grid.values(codes, scales)
    seen(0, found)
    for number, update in enumerate(updates):
        first = number % grid.carry_steps
        make([update], rule, on, error, fresh=not first)
        found = grid.values(codes, scales)
        seen(number + 1, found)
    return found


def in_window(rule: Rule, updates: int) -> int:
    """Of so many updates, how many are in a window that has not ended: what is carried on follows from them."""
    return updates % rule.grid.carry_steps if rule.grid else 0

"""Weights after any number of steps: live weights brought there, or a checkpoint made from files alone.

A checkpoint is made tensor by tensor, a run of a million elements at a time, without an engine or torch: the memory
needed does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from estune.children import cores
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint, terms
from estune.noise.reference import tensor_id
from estune.weights.checkpoint import DTYPES, RUN_LENGTH, Checkpoint, Tensor, convert
from estune.weights.policies import Rule
from estune.weights.trained import Array


class Steps:
    """Steps of a run, as far as its weights follow from them.

    Args:
        rule: how the base weights are kept and changed.
        updates: one for each step, oldest first.
        sigmas: by which the members of each step were perturbed. Only a policy that drifts needs them.
    """

    def __init__(self, rule: Rule, updates: Sequence[Update], sigmas: Sequence[float] = ()) -> None:
        self._rule = rule
        self._updates = updates
        self._sigmas = sigmas
        # Once for all tensors: made for each, they would grow to tensors x steps.
        self._terms = [terms(update, rule.rounding) for update in updates]

    def retrace(self, perturb: Callable[[Member, float], None], apply: Callable[[int], object]) -> None:
        """Do these steps again to weights, to the same bits.

        Args:
            perturb: perturb the weights by a member and its sigma; whatever is called next restores them first.
            apply: make the update of this number, from 0.
        """
        drifts = self._rule.how.drifts
        assert len(self._sigmas) == len(self._updates) or not drifts
        for number, update in enumerate(self._updates):
            if drifts:  # what rounding left behind at each restore is part of the run
                for member in update.members:
                    perturb(member, self._sigmas[number])
            apply(number)

    def rebuilt(self, tensor: Tensor, start: int, count: int) -> Array:
        """Elements `start .. start + count - 1` of a tensor of the base after these steps, in its type, `[count]`."""
        from estune.noise import cpu

        weights = convert(tensor.stored(start, count), DTYPES[self._rule.dtype])
        origin = weights.copy() if any(map(is_anchored, self._updates)) else weights
        key = self._rule.noise_key(tensor.name)

        def perturb(member: Member, sigma: float) -> None:
            for change in (member.sign * sigma, -member.sign * sigma):
                cpu.perturb(weights, weights, member.seed, key, start, change)

        def apply(number: int) -> None:
            if is_anchored(self._updates[number]):
                anchored(weights, origin, self._updates[number])
            t = self._terms[number]
            if t is not None:
                cpu.update(weights, t.seeds, t.coefficients, key, start, t.decay, t.rounding_seed)

        self.retrace(perturb, apply)
        return weights

    def write(
        self,
        base: Checkpoint,
        trained: Mapping[str, Sequence[str]],
        target: Path,
        dtype: str,
        verify: Callable[[str], None],
    ) -> None:
        """Write what these steps make of a base checkpoint.

        Args:
            base: where they begin.
            trained: the trained tensors by name, each with the names tied to it.
            target, dtype: as `Checkpoint.write` takes them.
            verify: called with the fingerprint when all is written; if it raises, nothing appears.
        """
        sums: dict[str, int] = {}
        tensors = {
            name: self._reader(base.tensors[primary], sums)
            for primary, aliases in trained.items()
            for name in (primary, *aliases)
        }
        base.write(target, tensors, dtype, lambda: verify(as_fingerprint(sum(sums.values()))))

    def _reader(self, tensor: Tensor, sums: dict[str, int]) -> Callable[[], Iterator[Array]]:
        """What `Checkpoint.write` reads a tensor by; leaves the sum of the tensor's hashes in `sums`."""
        from estune.noise import cpu

        key = tensor_id(tensor.name)

        def run(start: int) -> tuple[Array, int]:
            weights = self.rebuilt(tensor, start, min(RUN_LENGTH, tensor.elements - start))
            return weights, cpu.fingerprint(weights, key, start)

        def runs() -> Iterator[Array]:
            total = 0
            workers = cores()
            starts = range(0, tensor.elements, RUN_LENGTH)
            with ThreadPoolExecutor(workers) as threads:
                for i in range(0, len(starts), workers):
                    for weights, part in threads.map(run, starts[i : i + workers]):
                        total += part
                        yield weights
            sums[tensor.name] = total

        return runs


def is_anchored(update: Update) -> bool:
    """Whether an update brings weights back toward the base model."""
    return bool(update.anchor or update.anchor_l1)


def anchored(weights: Array, origin: Array, update: Update) -> None:
    """Bring weights as far toward the origin as an update says; float32 both, `[elements]`."""
    if update.anchor:
        weights += (origin - weights) * np.float32(update.anchor)
    if update.anchor_l1:
        weights += np.clip(origin - weights, np.float32(-update.anchor_l1), np.float32(update.anchor_l1))

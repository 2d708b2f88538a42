"""Weights after any number of steps: live weights brought there, or a checkpoint made from files alone.

A checkpoint is made tensor by tensor, a run of a million elements at a time, without an engine or torch: the memory
needed does not grow with the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from estune.children import cores
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint, terms
from estune.noise.reference import tensor_id
from estune.noise.rows import Run
from estune.weights.checkpoint import Checkpoint
from estune.weights.moments import has_moments, scaled_step
from estune.weights.policies import Rule
from estune.weights.tensors import DTYPES, RUN_LENGTH, Tensor, convert
from estune.weights.trained import Array

T = TypeVar("T")
R = TypeVar("R")
Told = Callable[[float], object]
"""Hears what share of the work is done, 0 to 1."""
Look = Callable[[Tensor, int, int, Array], object]
ALIGNED = 4096  # elements: of what kernels compute at a time


def unheard(share: float) -> None:
    """For who does not ask how far the work has come."""


def _unseen(number: int, weights: Array) -> None:
    """For who does not ask what weights were on the way."""


class Steps:
    """Steps of a run, as far as its weights follow from them.

    Args:
        rule: how the base weights are kept and changed.
        updates: one for each step, oldest first.
    """

    def __init__(self, rule: Rule, updates: Sequence[Update]) -> None:
        self._rule = rule
        self._updates = updates
        # Once for all tensors: made for each, they would grow to tensors x steps.
        self._terms = [terms(update, rule.rounding) for update in updates]

    def retrace(self, perturb: Callable[[Member, float], None], apply: Callable[[int], object]) -> None:
        """Do these steps again to weights, to the same bits.

        Args:
            perturb: perturb the weights by a member and its sigma; whatever is called next restores them first.
            apply: make the update of this number, from 0.
        """
        for number, update in enumerate(self._updates):
            if self._rule.how.drifts:  # what rounding left behind at each restore is part of the run
                for member in update.members:
                    perturb(member, update.sigma)
            apply(number)

    def rebuilt(
        self, tensor: Tensor, start: int, count: int, seen: Callable[[int, Array], object] | None = None
    ) -> Array:
        """Elements `start .. start + count - 1` of a tensor of the base after these steps, in its type, `[count]`.

        Args:
            tensor: of the base checkpoint.
            start, count: which of its elements.
            seen: called with the number of steps taken and the elements as they are then, before the first step and
                after each.
        """
        from estune.noise import cpu_anchor
        from estune.weights import integers, passes

        if self._rule.grid is not None:
            return integers.rebuilt(tensor, start, count, self._updates, self._rule, seen or _unseen)
        weights = convert(tensor.stored(start, count), DTYPES[self._rule.dtype])
        origin = weights.copy() if any(map(is_anchored, self._updates)) else weights
        columns = self._rule.noise_columns(tensor.columns)
        noise = self._rule.noise_key(tensor.name)
        scale = self._rule.scales.get(tensor.name, 1.0)
        rank = self._rule.rank
        run = Run(weights, weights, tensor_id(tensor.name), noise, start, columns=columns, rank=rank, scale=scale)

        first, second = (np.zeros_like(weights if has_moments(self._updates) else weights[:0]) for _ in range(2))

        def perturb(member: Member, sigma: float) -> None:
            for change in (member.sign * sigma, -member.sign * sigma):
                passes.perturb(run, member.seed, change)

        def apply(number: int) -> None:
            update = self._updates[number]
            if is_anchored(update):
                cpu_anchor.pull(weights, origin, update.anchor, update.anchor_l1)
            t = self._terms[number]
            if t is not None and (moments := update.moments):
                change = np.zeros_like(weights)
                passes.update(replace(run, live=change, base=change), replace(t, decay=0.0))
                scaled_step(weights, first, second, change, t.decay, moments, np.sqrt)
            elif t is not None:
                passes.update(run, t)
            if seen is not None:
                seen(number + 1, weights)

        if seen is not None:
            seen(0, weights)
        self.retrace(perturb, apply)
        return weights

    def fingerprints(
        self, base: Checkpoint, names: Iterable[str], told: Told = unheard, look: Look | None = None
    ) -> list[str]:
        """Fingerprints of the weights before the first of these steps and after each, `[steps + 1]`.

        Args:
            base: where they begin.
            names: the trained tensors.
            told: hears how far it has come.
            look: called, from any thread, with a tensor, the position of some of its elements, the number of steps
                taken and the elements as they are then.
        """
        from estune.noise import cpu_sums

        tensors = [base.tensors[name] for name in names]
        pieces = [(t, start, count) for t in tensors for start, count in pieces_of(t.elements, 1)]

        def sums(piece: tuple[Tensor, int, int]) -> list[int]:
            tensor, start, count = piece
            key = tensor_id(tensor.name)
            found: list[int] = []

            def seen(number: int, weights: Array) -> None:
                found.append(cpu_sums.fingerprint(weights, key, start))
                if look is not None:
                    look(tensor, start, number, weights)

            self.rebuilt(tensor, start, count, seen)
            return found

        totals = [0] * (len(self._updates) + 1)
        whole = sum(t.elements for t in tensors)
        done = 0
        for (_, _, count), found in zip(pieces, in_order(sums, pieces), strict=True):
            totals = [a + b for a, b in zip(totals, found, strict=True)]
            done += count
            told(done / whole)
        return [as_fingerprint(total) for total in totals]

    def write(
        self,
        base: Checkpoint,
        trained: Mapping[str, Sequence[str]],
        target: Path,
        dtype: str,
        verify: Callable[[str], None],
        told: Told = unheard,
    ) -> None:
        """Write what these steps make of a base checkpoint.

        Args:
            base: where they begin.
            trained: the trained tensors by name, each with the names tied to it.
            target, dtype: as `Checkpoint.write` takes them.
            verify: called with the fingerprint when all is written; if it raises, nothing appears.
            told: hears how far it has come.
        """
        sums: dict[str, int] = {}
        whole = sum(base.tensors[primary].elements * (1 + len(aliases)) for primary, aliases in trained.items())
        done = 0

        def count(elements: int) -> None:
            nonlocal done
            done += elements
            told(done / whole)

        tensors = {
            name: self._reader(base.tensors[primary], sums, count)
            for primary, aliases in trained.items()
            for name in (primary, *aliases)
        }
        base.write(target, tensors, dtype, lambda: verify(as_fingerprint(sum(sums.values()))), grid=self._rule.grid)

    def _reader(
        self, tensor: Tensor, sums: dict[str, int], count: Callable[[int], None]
    ) -> Callable[[], Iterator[Array]]:
        """What `Checkpoint.write` reads a tensor by.

        It leaves the sum of the tensor's hashes in `sums`, and calls `count` with the elements of each piece.
        """
        from estune.noise import cpu_sums

        key = tensor_id(tensor.name)

        def rebuild(piece: tuple[int, int]) -> tuple[Array, int]:
            start, length = piece
            weights = self.rebuilt(tensor, start, length)
            return weights, cpu_sums.fingerprint(weights, key, start)

        def runs() -> Iterator[Array]:
            total = 0
            for weights, part in in_order(rebuild, pieces_of(tensor.elements, cores())):
                total += part
                count(len(weights))
                yield weights
            sums[tensor.name] = total

        return runs


def is_anchored(update: Update) -> bool:
    """Whether an update brings weights back toward the base model."""
    return bool(update.anchor or update.anchor_l1)


def in_order(work: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """Work on pieces on all cores, few at a time: the results, in order."""
    workers = cores()
    with ThreadPoolExecutor(workers) as threads:
        waiting: deque[Future[R]] = deque()
        for piece in pieces:
            waiting.append(threads.submit(work, piece))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pieces_of(elements: int, workers: int) -> list[tuple[int, int]]:
    """A tensor in pieces of at most `RUN_LENGTH` elements, start and count: about as many for each of the workers."""
    rounds = -(-elements // (workers * RUN_LENGTH))
    length = -(-elements // max(1, workers * rounds))
    length = -(-length // ALIGNED) * ALIGNED
    return [(start, min(length, elements - start)) for start in range(0, elements, length)] if elements else []

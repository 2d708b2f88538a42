"""First and second moments of what updates add, a float32 each beside each base weight, and the step they scale.

They are no part of checkpoints: whoever brings weights to a step makes all updates before it again. So they are the
same wherever a run goes on, to the bit: each operation is rounded by itself, in NumPy and torch alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from estune.es.strategy import Moments, Update
from estune.noise.rows import Run

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 8  # of both moments of a weight
STRETCH = 1 << 20  # elements whose sum of noise is made at a time


def has_moments(updates: Iterable[Update]) -> bool:
    """Whether one of these updates is scaled by moments: where they lead is known from the first of them on alone."""
    return any(update.moments is not None for update in updates)


def scaled_step(
    base: Any, first: Any, second: Any, change: Any, decay: float, moments: Moments, root: Callable[[Any], Any]
) -> None:
    """Take in a change, `[elements]`, and add what the moments make of it; arrays or tensors, float32 all.

    m <- beta1 m + (1 - beta1) u, v <- beta2 v + (1 - beta2) u^2, and then
    base <- base + (decay base + rate m / (sqrt(correction v) + epsilon)): see `Adam` for where these numbers come from.

    Args:
        base, first, second: the weights and both moments (m, v), changed in place.
        change: u; left as something else.
        decay: share of the base that is added to it.
        moments: the numbers.
        root: the square root of an array of this kind.
    """
    first *= moments.beta1
    first += change * (1 - moments.beta1)
    change *= change
    change *= 1 - moments.beta2
    second *= moments.beta2
    second += change
    size = root(second * moments.correction)
    size += moments.epsilon
    step = first * moments.rate
    step /= size
    if decay:
        step += base * decay
    base += step


class MomentTensors:
    """The moments of live weights, where their base lies.

    Args:
        runs: the weights, of which the bases are float32 tensors.
        threads: CPU threads to spread the work over.
    """

    def __init__(self, runs: Sequence[Run], threads: int) -> None:
        import torch

        self._runs = runs
        self._threads = threads
        self._moments = [(torch.zeros_like(run.base), torch.zeros_like(run.base)) for run in runs]

    def apply(self, update: Update) -> None:
        """Make an update that is scaled by moments."""
        import torch

        from estune.weights.device import on_this_stream
        from estune.weights.storage import as_array, open_storage

        pieces = [
            (run.part(at, at + STRETCH), first[at : at + STRETCH], second[at : at + STRETCH])
            for run, (first, second) in zip(self._runs, self._moments, strict=True)
            for at in range(0, len(run.base), STRETCH)
        ]

        on_cpu = self._runs[0].base.device.type == "cpu"

        def work(piece: tuple[Run, Tensor, Tensor]) -> None:
            run, first, second = piece
            assert update.moments is not None
            change = torch.zeros_like(run.base)
            open_storage([replace(run, live=change, base=change)], 1).update(replace(update, decay=0.0), "nearest")
            if on_cpu:  # torch's root is not always the nearest number there
                arrays = [as_array(tensor) for tensor in (run.base, first, second, change)]
                scaled_step(arrays[0], arrays[1], arrays[2], arrays[3], update.decay, update.moments, np.sqrt)
            else:
                scaled_step(run.base, first, second, change, update.decay, update.moments, _root)

        if not on_cpu or self._threads == 1:
            for piece in pieces:
                work(piece)
            return
        with ThreadPoolExecutor(self._threads) as threads:
            list(threads.map(on_this_stream(self._runs[0].base.device, work), pieces))


def _root(tensor: Tensor) -> Tensor:
    """The square root of float32 numbers, the nearest there is: a device's own may be another, but for float64."""
    return tensor.double().sqrt().float()

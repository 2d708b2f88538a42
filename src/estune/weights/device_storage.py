"""Weights on a CUDA device, and the passes over all of them: see `storage.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from estune.es.strategy import Update
from estune.es.update import Terms, terms
from estune.noise.rows import Run
from estune.weights.device import device_kernels
from estune.weights.split import whole

STREAMED_LENGTH = 8 << 20  # elements that pass through a buffer at a time: 32 MiB of float32
BUFFERS = 2  # one is filled while the other is worked on


class DeviceStorage:
    """On a device, all runs in a few launches, in order with all else that is launched there."""

    reverses_low_rank = False

    def __init__(self, runs: Sequence[Run]) -> None:
        self._device: torch.device = runs[0].live.device
        self._runs = list(runs)
        self._live: list[Any] = []  # batches of the live weights alone, once members are perturbed along others
        self._batches = self._batched(runs)
        self._reversible: list[Any] = []  # for each batch, once they are perturbed reversibly

    def _batched(self, runs: Sequence[Run]) -> list[Any]:
        """The runs in batches for the kernels, each of one kind of noise."""
        with self._on_device():
            return [batch_of(alike) for alike in _by_noise(runs)]

    def perturb(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb`."""
        self.each(lambda batch: batch.perturb(seed, sigma * _scale(batch)))

    def perturb_along(self, terms: Terms) -> None:
        """As `Storage.perturb_along`."""
        self.restore()
        seeds, coefficients = self._sent(terms)
        with self._on_device():
            self._live = self._live or [
                batch_of([replace(run, base=run.live) for run in alike]) for alike in _by_noise(self._runs)
            ]
            for batch in self._live:
                batch.update(seeds, coefficients[_scale(batch)])

    def restore(self) -> None:
        """As `Storage.restore`."""
        self.each(lambda batch: batch.restore())

    def perturb_reversibly(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb_reversibly`."""
        from estune.noise.gpu_inplace import Reversible

        with self._on_device():
            self._reversible = self._reversible or [Reversible(batch) for batch in self._in_place()]
            for reversible in self._reversible:
                reversible.perturb(seed, sigma * _scale(reversible))

    def reverse(self, seed: int, sigma: float) -> None:
        """As `Storage.reverse`."""
        with self._on_device():
            for reversible in self._reversible:
                reversible.restore(seed, sigma * _scale(reversible))

    @property
    def patch_bytes(self) -> int:
        """As `Storage.patch_bytes`."""
        return sum(batch.nbytes for batch in self._reversible)

    def _in_place(self) -> list[Any]:
        """The batches that members perturb in place."""
        return self._batches

    def update(self, update: Update, rounding: str) -> None:
        """As `Storage.update`."""
        found = terms(update, rounding)
        if found is None:
            return
        seeds, coefficients = self._sent(found)

        def work(batch: Any) -> None:
            batch.update(seeds, coefficients[_scale(batch)], found.decay, found.rounding_seed)

        self.each(work, changes_base=True)

    def _sent(self, terms: Terms) -> tuple[Tensor, dict[float, Tensor]]:
        """Terms on the device: seeds, and coefficients for each scale."""
        seeds = torch.from_numpy(terms.seeds.view(np.int64)).to(self._device)
        scales = {run.scale for run in self._runs}
        return seeds, {scale: torch.from_numpy(terms.scaled(scale)).to(self._device) for scale in scales}

    def fingerprint(self) -> int:
        """As `Storage.fingerprint`."""
        total = torch.zeros(1, dtype=torch.int64, device=self._device)
        self.each(lambda batch: batch.fingerprint(total))
        return int(total)

    def each(self, work: Callable[[Any], object], *, changes_base: bool = False) -> None:
        """Do work on each batch on the device; `changes_base` says that it writes to the base."""
        with self._on_device():
            for batch in self._batches:
                work(batch)

    def _on_device(self) -> AbstractContextManager[None]:
        """Make the weights' device the current one, on which Triton launches. Does nothing on the CPU."""
        return torch.cuda.device(self._device if self._device.type == "cuda" else -1)


class StreamedStorage(DeviceStorage):
    """Live weights on a device, the base in host memory: it passes through buffers on the device, 64 MiB in all.

    Each buffer has a stream of its own. Within a stream things happen in order, so that a buffer is filled, worked on
    and written back before it is filled again, and between the two streams copies and kernels overlap.
    """

    def _batched(self, runs: Sequence[Run]) -> list[Any]:
        """The runs in batches, each with its base in a buffer into which it fits. The buffers take turns."""
        noises = ([part for run in alike for part in run.split(STREAMED_LENGTH)] for alike in _by_noise(runs))
        loads = [load for parts in noises for load in _loads(parts)]
        self._streams = torch.get_device_module(self._device)  # the CPU's do nothing
        size = max(sum(_padded(run) for run in load) for load in loads)
        with self._on_device():
            self.buffers = [
                (self._streams.Stream(), torch.empty(size, dtype=torch.uint8, device=self._device))
                for _ in range(BUFFERS)
            ]
            pairs = list(zip(loads, itertools.cycle(self.buffers), strict=False))
            self._bases = [[run.base for run in load] for load, _ in pairs]
            return [batch_of(_staged(load, buffer)) for load, (_, buffer) in pairs]

    def each(self, work: Callable[[Any], object], *, changes_base: bool = False) -> None:
        """As `DeviceStorage.each`, on copies of the base that pass through the buffers."""
        with self._on_device():
            current = self._streams.current_stream()
            for stream, _ in self.buffers:
                stream.wait_stream(current)
            streams = itertools.cycle(stream for stream, _ in self.buffers)
            for batch, bases, stream in zip(self._batches, self._bases, streams, strict=False):
                with self._streams.stream(stream):
                    for run, base in zip(batch.runs, bases, strict=True):
                        run.base.copy_(whole(base), non_blocking=True)
                    work(batch)
                    if changes_base:
                        for run, base in zip(batch.runs, bases, strict=True):
                            base.copy_(run.base, non_blocking=True)
            for stream, _ in self.buffers:
                current.wait_stream(stream)
            self._streams.synchronize()  # the host may read or write the base from here on


class SplitStorage(StreamedStorage):
    """On a device, with bases in halves, which are put together in the buffers."""

    def perturb_reversibly(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb_reversibly`."""
        for run in self._runs:
            run.base.untie()
        super().perturb_reversibly(seed, sigma)

    def reverse(self, seed: int, sigma: float) -> None:
        """As `Storage.reverse`."""
        super().reverse(seed, sigma)
        for run in self._runs:
            run.base.tie()

    def _in_place(self) -> list[Any]:
        """The batches that members perturb in place, with the lower halves in the base's place."""
        halves = [replace(run, base=run.base.lower) for run in self._runs]
        return [batch_of(alike) for alike in _by_noise(halves)]


def batch_of(runs: Sequence[Run]) -> Any:
    """Runs of one kind of noise, on one device, as a batch for its kernels."""
    if not runs[0].columns:
        return device_kernels().Batch(runs)
    from estune.noise import gpu_low_rank

    return gpu_low_rank.Batch(runs)


def _by_noise(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups of one scale and one kind of noise each, as launches of kernels have."""
    found: dict[tuple[float, bool], list[Run]] = {}
    for run in runs:
        found.setdefault((run.scale, run.columns > 0), []).append(run)
    return list(found.values())


def _scale(batch: Any) -> float:
    """The scale of the noise of a batch's runs."""
    scale: float = batch.runs[0].scale
    return scale


def _loads(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of neighbouring runs whose bases fit into a buffer together."""
    room = STREAMED_LENGTH * max(run.base.element_size() for run in runs)
    loads: list[list[Run]] = []
    left = 0
    for run in runs:
        if not loads or _padded(run) > left:
            loads.append([])
            left = room
        loads[-1].append(run)
        left -= _padded(run)
    return loads


def _padded(run: Run) -> int:
    """Bytes that a run's base takes in a buffer, where each begins at a multiple of 16."""
    return 16 * -(-int(run.base.nbytes) // 16)


def _staged(load: Sequence[Run], buffer: Tensor) -> list[Run]:
    """Runs with their bases in a buffer, one after another."""
    ends = itertools.accumulate(_padded(run) for run in load)
    starts = (end - _padded(run) for end, run in zip(ends, load, strict=True))
    return [
        replace(run, base=buffer[start : start + run.base.nbytes].view(run.base.dtype))
        for start, run in zip(starts, load, strict=True)
    ]

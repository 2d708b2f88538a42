"""Where weights lie, and the passes over all of them: perturb, restore, update, fingerprint.

- `CpuStorage`: on the CPU, in runs spread over threads.
- `HostStorage`: live weights on a device that we have no kernels for (Apple's MPS), all else on the CPU.
- `DeviceStorage`: on a CUDA device, all runs in a few launches.
- `StreamedStorage`: live weights on the device, the base in pinned host memory, passing through buffers on the device.
- `SplitStorage`: on a CUDA device, with bases in halves (`split.py`).

All give the same bits, because each kernel does, and every element's result depends on its own history alone.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from estune.errors import EstuneError
from estune.es.strategy import Update
from estune.es.update import Terms, terms
from estune.noise.rows import Run
from estune.weights.checkpoint import RUN_LENGTH, narrow
from estune.weights.device import device_kernels
from estune.weights.policies import TYPE_NAMES
from estune.weights.split import SplitBase, whole

STREAMED_LENGTH = 8 << 20  # elements that pass through a buffer at a time: 32 MiB of float32
BUFFERS = 2  # one is filled while the other is worked on

Array = npt.NDArray[Any]
T = TypeVar("T")


class Storage(Protocol):
    """Weights at one place."""

    reverses_rank1: bool
    """Whether `perturb_reversibly` knows noise of rank one."""

    def perturb(self, seed: int, sigma: float) -> None:
        """Set live = base + sigma * noise(seed)."""
        ...

    def perturb_along(self, terms: Terms) -> None:
        """Set live = base, rounded to the type of live, and then add these terms, rounded once."""
        ...

    def restore(self) -> None:
        """Set live = base."""
        ...

    def perturb_reversibly(self, seed: int, sigma: float) -> None:
        """Add sigma * noise(seed) to live weights that are their own base, and note what `reverse` needs."""
        ...

    def reverse(self, seed: int, sigma: float) -> None:
        """Take back the last `perturb_reversibly`, which had these arguments, to the bit."""
        ...

    @property
    def patch_bytes(self) -> int:
        """Bytes of what has been noted, or would have room."""
        ...

    def update(self, update: Update, rounding: str) -> None:
        """Add an update to the base."""
        ...

    def fingerprint(self) -> int:
        """Sum of the hashes of the base's elements, of which the last 64 bits matter. Runs not counted are left out."""
        ...


class CpuStorage:
    """On the CPU, a million elements at a time, spread over threads."""

    reverses_rank1 = True

    def __init__(self, runs: Sequence[Run], threads: int) -> None:
        arrays = (replace(r, live=self._live(r.live), base=_on_cpu(r.base)) for r in runs)
        self._runs = [part for run in arrays for part in run.split(RUN_LENGTH)]
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._patches: list[Any] = []  # of each run, once they are perturbed reversibly

    def perturb(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb`."""
        from estune.weights.passes import perturb

        self.each(lambda run: perturb(run, seed, sigma))

    def perturb_along(self, terms: Terms) -> None:
        """As `Storage.perturb_along`."""
        self.each(lambda run: _perturb_along(run, terms))

    def restore(self) -> None:
        """As `Storage.restore`."""
        self.each(_copy_base)

    def perturb_reversibly(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb_reversibly`."""
        from estune.noise.cpu_inplace import Patches
        from estune.weights.passes import perturb_reversibly

        self._patches = self._patches or [Patches() for _ in self._runs]
        self._each_patched(perturb_reversibly, seed, sigma)

    def reverse(self, seed: int, sigma: float) -> None:
        """As `Storage.reverse`."""
        from estune.weights.passes import reverse

        self._each_patched(reverse, seed, sigma)

    @property
    def patch_bytes(self) -> int:
        """As `Storage.patch_bytes`."""
        return sum(patches.nbytes for patches in self._patches)

    def update(self, update: Update, rounding: str) -> None:
        """As `Storage.update`."""
        from estune.weights import passes

        t = terms(update, rounding)
        if t is not None:
            self.each(lambda run: passes.update(run, t))

    def fingerprint(self) -> int:
        """As `Storage.fingerprint`."""
        from estune.weights.passes import fingerprint

        return sum(self.each(lambda run: fingerprint(run) if run.counted else 0))

    def each(self, work: Callable[[Run], T]) -> list[T]:
        """Do work on each run, spread over the threads; return the results, in order."""
        return list(map(work, self._runs) if self._threads is None else self._threads.map(work, self._runs))

    def _each_patched(self, work: Callable[[Run, Any, int, float], None], seed: int, sigma: float) -> None:
        """Do work on each run and its patches, with a seed and a sigma, spread over the threads."""
        each = map if self._threads is None else self._threads.map
        list(each(lambda run, patches: work(run, patches, seed, sigma), self._runs, self._patches))

    @staticmethod
    def _live(tensor: Tensor) -> Any:
        return as_array(tensor)


class HostStorage(CpuStorage):
    """The base on the CPU, live weights on a device: they are computed here, a million elements at a time, and copied.

    So all bits are the CPU's. Where device and CPU share their memory, as on Apple's machines, a copy takes no longer
    than reading and writing. A base must be kept: weights that are perturbed in place would have to be copied here
    first.
    """

    def __init__(self, runs: Sequence[Run], threads: int) -> None:
        super().__init__(runs, threads)
        self._copying = threading.Lock()  # PyTorch promises nothing of threads that copy to MPS at once

    def perturb(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb`."""
        from estune.weights.passes import perturb

        self._write(lambda run: perturb(run, seed, sigma))

    def perturb_along(self, terms: Terms) -> None:
        """As `Storage.perturb_along`."""
        self._write(lambda run: _perturb_along(run, terms))

    def restore(self) -> None:
        """As `Storage.restore`."""
        self._write(_copy_base)

    def _write(self, work: Callable[[Run], object]) -> None:
        """Let `work` fill the live weights of each run: memory of the CPU, which is then copied to the device."""

        def fill(run: Run) -> None:
            staged = torch.empty(len(run.live), dtype=run.live.dtype)
            work(replace(run, live=as_array(staged)))
            with self._copying:
                run.live.copy_(staged)

        self.each(fill)

    @staticmethod
    def _live(tensor: Tensor) -> Any:
        return tensor


class DeviceStorage:
    """On a device, all runs in a few launches, in order with all else that is launched there."""

    reverses_rank1 = False

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
    from estune.noise import gpu_rank1

    return gpu_rank1.Batch(runs)


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


def open_storage(runs: Sequence[Run], threads: int) -> Storage:
    """The storage for tensors that lie where these do."""
    live = runs[0].live.device.type
    base = runs[0].base.device.type
    if live == "cpu":
        return CpuStorage(runs, threads)
    if base == "cpu" and live != "cuda":
        return HostStorage(runs, threads)
    if isinstance(runs[0].base, SplitBase):
        return SplitStorage(runs)
    return DeviceStorage(runs) if base == live else StreamedStorage(runs)


def sums_of_squares(base: Tensor, stored: Array) -> Array:
    """As `squares` of `noise/cpu.py`.

    Args:
        base: weights, `[elements]`, on any device.
        stored: as many weights on the host.
    """
    if base.device.type == "cpu":
        from estune.noise import cpu

        return cpu.squares(as_array(base), stored)
    then = torch.from_numpy(stored)
    then = then.view(torch.bfloat16) if stored.dtype == np.uint16 else then
    with torch.cuda.device_of(base):  # type: ignore[no-untyped-call]
        sums: Array = device_kernels().squares(base, then.to(base.device)).cpu().numpy()
    return sums


def flat(tensor: Tensor) -> Tensor:
    """The tensor's own memory, `[elements]`, row-major.

    Args:
        tensor: contiguous, of any shape.

    Raises:
        EstuneError: for a type or device without kernels.
    """
    if tensor.device.type not in {"cpu", "cuda", "mps"}:
        raise EstuneError(f"weights on {tensor.device}: they can be perturbed on cuda, mps and cpu; set device to one")
    if not tensor.is_contiguous():
        raise EstuneError(f"a weight of shape {tuple(tensor.shape)} is not contiguous: save and load the model again")
    if type_name(tensor.dtype) not in TYPE_NAMES:
        raise EstuneError(
            f"weights of type {type_name(tensor.dtype)}: there are kernels for {', '.join(TYPE_NAMES)}; set dtype to "
            "one"
        )
    return tensor.detach().view(-1)


def _on_cpu(base: Tensor | SplitBase) -> Any:
    """A base as the CPU's passes take it."""
    return base if isinstance(base, SplitBase) else as_array(base)


def as_array(tensor: Tensor) -> Array:
    """The memory of a tensor on the CPU as an array, `[elements]`; bfloat16 as its bits in uint16."""
    elements = flat(tensor)
    array: Array = (elements.view(torch.uint16) if tensor.dtype == torch.bfloat16 else elements).numpy()
    return array


def type_name(dtype: torch.dtype) -> str:
    """A type as settings and journals name it."""
    return str(dtype).removeprefix("torch.")


def _copy_base(run: Run) -> None:
    halves = run.live.dtype == np.uint16 and run.base.dtype == np.float32
    run.live[:] = narrow(run.base, "BF16") if halves else run.base


def _perturb_along(run: Run, terms: Terms) -> None:
    from estune.weights import passes

    _copy_base(run)
    passes.update(replace(run, base=run.live), terms)

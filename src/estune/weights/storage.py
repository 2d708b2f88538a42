"""Where weights lie, and the passes over all of them: perturb, restore, update, fingerprint.

- `CpuStorage`: on the CPU, in runs spread over threads.
- `HostStorage`: live weights on a device that we have no kernels for (Apple's MPS), all else on the CPU.
- `DeviceStorage`: on a CUDA device, all runs in a few launches.
- `StreamedStorage`: live weights on the device, the base in pinned host memory, passing through buffers on the device.
- `SplitStorage`: on a CUDA device, with bases in halves (`split.py`).

The last three are in `device_storage.py`. All give the same bits, because each kernel does, and every element's result
depends on its own history alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from estune.weights.device import device_kernels
from estune.weights.device_storage import DeviceStorage, SplitStorage, StreamedStorage
from estune.weights.policies import TYPE_NAMES
from estune.weights.split import SplitBase
from estune.weights.tensors import RUN_LENGTH

Array = npt.NDArray[Any]
T = TypeVar("T")


class Storage(Protocol):
    """Weights at one place."""

    reverses_low_rank: bool
    """Whether `perturb_reversibly` knows noise of low rank."""

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

    reverses_low_rank = True

    def __init__(self, runs: Sequence[Run], threads: int) -> None:
        arrays = (replace(r, live=self._live(r.live), base=_on_cpu(r.base)) for r in runs)
        self._runs = [part for run in arrays for part in run.split(RUN_LENGTH)]
        self._threads = ThreadPoolExecutor(threads) if threads > 1 else None
        self._patches: list[Any] = []  # of each run, once they are perturbed reversibly

    def perturb(self, seed: int, sigma: float) -> None:
        """As `Storage.perturb`."""
        from estune.weights.passes import perturb

        self._fill(lambda run: perturb(run, seed, sigma))

    def perturb_along(self, terms: Terms) -> None:
        """As `Storage.perturb_along`."""
        from estune.weights.passes import perturb_along

        self._fill(lambda run: perturb_along(run, terms))

    def restore(self) -> None:
        """As `Storage.restore`."""
        from estune.weights.passes import restore

        self._fill(restore)

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

    def _fill(self, work: Callable[[Run], object]) -> None:
        """Let `work` fill the live weights of each run."""
        self.each(work)

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

    def _fill(self, work: Callable[[Run], object]) -> None:
        """As that of `CpuStorage`, in memory of the CPU, which is then copied to the device."""

        def fill(run: Run) -> None:
            staged = torch.empty(len(run.live), dtype=run.live.dtype)
            work(replace(run, live=as_array(staged)))
            with self._copying:
                run.live.copy_(staged)

        self.each(fill)

    @staticmethod
    def _live(tensor: Tensor) -> Any:
        return tensor


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
    """As `squares` of `noise/cpu_sums.py`.

    Args:
        base: weights, `[elements]`, on any device.
        stored: as many weights on the host.
    """
    if base.device.type == "cpu":
        from estune.noise import cpu_sums

        return cpu_sums.squares(as_array(base), stored)
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

"""When jobs are done: each is taken, in a given order, by the worker that is free first, as in the pools."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def finish(durations: Array, workers: int) -> Array:
    """When each job ends, if all may begin at time 0 and each is taken, in order, by the worker that is free first.

    Args:
        durations: `[..., jobs]`, with independent cases in the leading dimensions.
        workers: 1 or more, of equal speed.

    Returns:
        Times, `[..., jobs]`, in the order of the jobs.
    """
    if workers >= durations.shape[-1]:
        return durations.copy()
    if workers == 1:
        return np.cumsum(durations, axis=-1)
    jobs = durations.reshape(-1, durations.shape[-1])
    cases = np.arange(len(jobs))
    free = np.zeros((len(jobs), workers), durations.dtype)
    ends = np.empty_like(jobs)
    for job in range(jobs.shape[1]):
        worker = free.argmin(axis=1)
        free[cases, worker] += jobs[:, job]
        ends[:, job] = free[cases, worker]
    return ends.reshape(durations.shape)


def makespan(durations: Array, workers: int) -> Array:
    """When the last job ends, `[...]`. The arguments are those of `finish`."""
    found: Array = finish(durations, workers).max(axis=-1)
    return found

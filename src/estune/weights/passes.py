"""The CPU's passes over a run, by the kernels of its noise, times its scale: perturb, restore, update, fingerprint.

The base is an array, or a `SplitBase`, which becomes one for an update and is split again. Perturbing weights that
are their own base, and taking that back, needs no array in between.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from estune.es.update import Terms
from estune.noise import cpu, cpu_sums, low_rank
from estune.noise.rows import Run

if TYPE_CHECKING:
    from estune.noise.cpu_inplace import Patches


def perturb(run: Run, seed: int, sigma: float) -> None:
    """Set live = base + sigma * scale * noise(seed); `cpu.perturb` says how it is rounded."""
    sigma *= run.scale
    run = _with_array(run)
    if not run.columns:
        cpu.perturb(run.live, run.base, seed, run.noise, run.start, sigma, run.rows)
        return
    for part in run.stretches():
        low_rank.perturb(part.live, part.base, seed, part.noise, part.start, sigma, part.columns, part.rank)


def perturb_along(run: Run, terms: Terms) -> None:
    """Set live = base, rounded to the type of live, and then add these terms, rounded once."""
    restore(run)
    update(replace(run, base=run.live), terms)


def restore(run: Run) -> None:
    """Set live = base."""
    cpu.copy(run.live, run.base)


def perturb_reversibly(run: Run, patches: Patches, seed: int, sigma: float) -> None:
    """Perturb live weights that are their own base, and note what `reverse` needs."""
    from estune.noise import cpu_inplace

    if _is_split(run):
        run.base.untie()
    cpu_inplace.perturb(run.live, patches, *_key(run, seed, sigma))


def reverse(run: Run, patches: Patches, seed: int, sigma: float) -> None:
    """Take back the last `perturb_reversibly`, which had these arguments."""
    from estune.noise import cpu_inplace

    cpu_inplace.restore(run.live, patches, *_key(run, seed, sigma))
    if _is_split(run):
        run.base.tie()


def update(run: Run, terms: Terms) -> None:
    """Add an update to the base; `cpu.update` says how it is rounded."""
    members = terms.seeds, terms.scaled(run.scale)
    how = terms.decay, terms.rounding_seed
    whole = _with_array(run)
    if run.columns:
        for part in whole.stretches():
            low_rank.update(part.base, *members, part.noise, part.start, *how, part.columns, part.rank)
    else:
        cpu.update(whole.base, *members, run.noise, run.start, *how, run.rows)
    if whole is not run:
        run.base.put(whole.base)


def fingerprint(run: Run) -> int:
    """Hash of the base: `cpu_sums.fingerprint`."""
    return cpu_sums.fingerprint(_with_array(run).base, run.key, run.start, run.rows)


def _key(run: Run, seed: int, sigma: float) -> tuple[Any, ...]:
    """What the kernels that perturb in place know a run's noise by, and its lower halves."""
    lower = run.base.lower_bits if _is_split(run) else None
    return seed, run.noise, run.start, sigma * run.scale, run.rows, lower, run.columns, run.rank


def _with_array(run: Run) -> Run:
    """The run with a base that is an array: its own, or a copy of one that is split."""
    return replace(run, base=run.base.array()) if _is_split(run) else run


def _is_split(run: Run) -> bool:
    return not isinstance(run.base, np.ndarray)

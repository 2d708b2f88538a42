"""The CPU's two passes over a run, perturb and update, by the kernels of its noise, times its scale."""

from __future__ import annotations

from estune.es.update import Terms
from estune.noise import cpu, rank1
from estune.noise.rows import Run


def perturb(run: Run, seed: int, sigma: float) -> None:
    """Set live = base + sigma * scale * noise(seed); `cpu.perturb` says how it is rounded."""
    sigma *= run.scale
    if not run.columns:
        cpu.perturb(run.live, run.base, seed, run.noise, run.start, sigma, run.rows)
        return
    for part in run.stretches():
        rank1.perturb(part.live, part.base, seed, part.noise, part.start, sigma, part.columns)


def update(run: Run, terms: Terms) -> None:
    """Add an update to the base; `cpu.update` says how it is rounded."""
    members = terms.seeds, terms.scaled(run.scale)
    how = terms.decay, terms.rounding_seed
    if not run.columns:
        cpu.update(run.base, *members, run.noise, run.start, *how, run.rows)
        return
    for part in run.stretches():
        rank1.update(part.base, *members, part.noise, part.start, *how, part.columns)

"""A simulation of members over workers, step by step: how long a step and a run take, with one worker to a thousand.

Completions' lengths are drawn for every member, workers that are free take members in order, and the update begins when
the last member is done. Draws are the same every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.charts.words import DAY
from estune.study.estimate.lengths import Lengths
from estune.study.estimate.needs import Item, shares_base
from estune.study.estimate.needs import trained as trained_elements
from estune.study.estimate.schedule import makespan
from estune.study.estimate.times import Times
from estune.weights.policies import POLICIES

MOST_WORKERS = 1024
STEPS = 64  # that are played through, or as many as take no more than so many draws
DRAWS = 1 << 20
STRAGGLERS = 0.01
"""Share of members that take twice as long, as if their worker was lost: an assumption."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A run with a number of workers."""

    workers: int  # engines
    devices: int
    step: float  # seconds, in the mean
    efficiency: float  # share of the workers' time in which one alone would be at the same
    tokens_per_second: float
    days: float  # of all steps and evaluations
    device_hours: float


@dataclass(frozen=True, slots=True)
class Speed:
    """A run, with its own workers, by one engine."""

    engine: str
    rows: int  # sequences decoded at once
    token: float  # seconds for one token of all of them
    limit: str  # what most of that is
    member: float  # seconds
    step: float
    tokens_per_second: float
    days: float


@dataclass(frozen=True, slots=True)
class Split:
    """A step's completions as so many members of so many prompts."""

    population: int
    prompts: int
    step: float  # seconds
    tokens_per_second: float


class Jobs:
    """What workers take: a member, or as many as one of them decodes together.

    Attributes:
        taken, read: seconds to make ready and to read the prompts, `[jobs]`.
        generated: seconds of all further tokens, `[steps, jobs]`.
        seconds: all of that, and of some twice as much, `[steps, jobs]`.
    """

    def __init__(self, times: Times, drawn: npt.NDArray[Any], slower: npt.NDArray[Any], size: int) -> None:
        """Members of a step in jobs of `size`, the last one of what is left.

        Args:
            drawn: lengths, `[steps, members, prompts]`.
            slower: a factor of each member's time, `[steps, members]`; a job's is that of its first.
        """
        steps, members, prompts = drawn.shape
        firsts = range(0, members, size)
        sizes = [min(size, members - first) for first in firsts]
        self.taken = np.array([times.perturb(count) for count in sizes])
        self.read = np.array([times.read(count * prompts) for count in sizes])
        full = members // size
        whole = times.generate(drawn[:, : full * size].reshape(steps * full, size * prompts)).reshape(steps, full)
        rest = drawn[:, full * size :].reshape(steps, -1)
        left = times.generate(rest)[:, None] if rest.size else np.zeros((steps, 0))
        self.generated = np.concatenate([whole, left], axis=1)
        self.seconds = (self.taken + self.read + self.generated) * slower[:, ::size]


class Plan:
    """A run's steps, simulated.

    Args:
        times: how long its parts take.
        lengths: lengths of completions, to draw from.
    """

    def __init__(self, times: Times, lengths: Lengths) -> None:
        self.times = times
        self.work = work = times.work
        self._mean = float(lengths.mean())
        draw = np.random.default_rng(0)
        steps = int(np.clip(DRAWS // (work.population * work.prompts), 1, STEPS))
        self._drawn = draw.choice(lengths, (steps, work.population, work.prompts))
        self._slower = 1 + (draw.random(self._drawn.shape[:2]) < STRAGGLERS)
        self._by_size: dict[int, Jobs] = {}
        self._batches = self._evaluation(draw, lengths)

    def jobs(self, workers: int) -> Jobs:
        """What this many workers take."""
        size = self.work.members_of_job(workers)
        if size not in self._by_size:
            self._by_size[size] = Jobs(self.times, self._drawn, self._slower, size)
        return self._by_size[size]

    @property
    def own(self) -> int:
        """Engines of the run that do not share a device, or devices that engines share."""
        return self.work.places if self.times.device.is_gpu else self.work.engines

    def step(self, workers: int) -> float:
        """Mean seconds of a step with this many workers side by side."""
        members = float(makespan(self.jobs(workers).seconds, workers).mean())
        return self.times.restore() + members + self.times.update() + self._look(workers)

    def _look(self, workers: int) -> float:
        """Mean seconds in which the base completes its prompts after an update."""
        if not self.work.looks:
            return 0.0
        alone = self.times.alone()
        one = alone.read(self.work.prompts) + float(alone.generate(self._drawn[:, 0]).mean())
        return math.ceil(self.work.looks / workers) * one

    def days(self, workers: int) -> float:
        """Days of all steps and evaluations with this many workers."""
        evaluation = float(makespan(self._batches, workers)) if self._batches.size else 0.0
        return (self.work.steps * self.step(workers) + self.work.evaluations * evaluation) / DAY

    def scales(self) -> list[Scale]:
        """The run with one worker to `MOST_WORKERS`, and with its own number."""
        counts = {1 << i for i in range(MOST_WORKERS.bit_length())} | {self.own}
        alone = self.step(1)
        return [self._scale(count, alone) for count in sorted(counts)]

    def speed(self) -> Speed:
        """The run with its own workers."""
        work = self.work
        jobs = self.jobs(self.own)
        rows = min(work.rows, work.prompts * work.members_of_job(self.own))
        token, limit = self.times.token(rows, self._mean / 2)
        step = self.step(self.own)
        return Speed(
            work.engine + (f", noise=rank{work.rank}" if work.rank else ""),
            work.rows,
            token,
            limit,
            float(jobs.seconds.sum(axis=1).mean()) / work.population,
            step,
            self._tokens / step,
            self.days(self.own),
        )

    def split(self) -> Split:
        """The run's members and prompts, and a step's time."""
        step = self.step(self.own)
        return Split(self.work.population, self.work.prompts, step, self._tokens / step)

    def items(self) -> list[Item]:
        """Seconds of a step's parts, one after another."""
        work = self.work
        times = self.times
        jobs = self.jobs(self.own)
        size = work.members_of_job(self.own)
        batches = times.batches(work.prompts * size)
        of = f" of {batches} batches" if batches > 1 else ""
        on = f" on {self.own} {'GPUs' if times.device.is_gpu else 'engines'}" if self.own > 1 else ""
        if work.parallel > 1:
            on = f" on {self.own} x {work.parallel} GPUs"
        members = f"{work.population} members{f', {size} in a batch' if size > 1 else ''}{on}"
        alive = work.prompts * size / batches
        token, limit = times.token(min(alive, work.rows), self._mean / 2)
        taken, read, generated = (
            float(part.sum()) / self.own for part in (jobs.taken, jobs.read, jobs.generated.mean(0))
        )
        look = self._look(self.own)
        shared = ", shared out over all replicas" if shares_base(work, times.device) else ""
        shared = f", on each of {work.replicas} replicas" if work.replicas > 1 and times.device.is_gpu else shared
        trained = f"{times.shape.vectors(work.rank) if work.rank else trained_elements(times.shape, work):,}"
        way = "read the base, draw {} numbers, write live weights"
        if not POLICIES[work.policy].keeps_base:
            way = "take back the member before and perturb the base: draw 2 x {} numbers, read and write twice"
        if work.over_base:
            restored = "restore the base once, " if POLICIES[work.policy].keeps_base else ""
            way = f"{restored}draw {times.shape.vectors(work.rank):,} numbers of each"
        return [
            Item(
                "perturb",
                times.restore() + taken,
                f"{members}: {way.format(f'{work.drawn} x {trained}' if work.drawn > 1 else trained)}",
            ),
            Item(
                "read the prompts",
                read,
                f"{members}{of} of {alive:.0f} x {work.prompt_tokens} tokens",
            ),
            Item(
                "generate",
                generated,
                f"{members}{of}, until the longest ends, {self._mean:,.0f} tokens on average; {1e3 * token:.3g} ms a "
                f"token of {min(alive, work.rows):.0f} rows, mostly {limit}",
            ),
            Item(
                "wait for the last",
                max(0.0, self.step(self.own) - times.restore() - times.update() - look - taken - read - generated),
                f"workers without a member; {STRAGGLERS:.0%} of members take twice as long",
            ),
            Item(
                "update",
                times.update(),
                f"draw {work.population + work.redrawn} x {trained} numbers, read and write the base once{shared}",
            ),
            *([Item("look at the base", look, f"{work.looks} x {work.prompts} prompts")] if work.looks else []),
        ]

    @property
    def _tokens(self) -> float:
        """Tokens generated in a step."""
        return self.work.population * self.work.prompts * self._mean

    def _scale(self, count: int, alone: float) -> Scale:
        step = self.step(count)
        days = self.days(count)
        devices = count * self.work.parallel
        workers = count * self.work.at_once if self.times.device.is_gpu else count
        return Scale(
            workers, devices, step, alone / (count * step), self._tokens / step, days, devices * days * DAY / 3600
        )

    def _evaluation(self, draw: np.random.Generator, lengths: Lengths) -> npt.NDArray[Any]:
        """Seconds of an evaluation's batches."""
        from estune.pool.base import EVALUATION_BATCH

        prompts = self.work.evaluated
        if not prompts:
            return np.zeros(0)
        batches = math.ceil(prompts / EVALUATION_BATCH)
        each = math.ceil(prompts / batches)
        alone = self.times.alone()
        return alone.read(each) + alone.generate(draw.choice(lengths, (batches, each)))

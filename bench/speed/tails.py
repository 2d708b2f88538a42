"""What could shorten the wait for a step's last member: orders and splits, played through on paper.

    python -m bench.speed.tails [--gpu h100] [--new-tokens 300]

A step of 30 members of Qwen2.5-7B's sizes and 200 prompts, as `estune estimate` plays it: lengths drawn for every
member, one member in a hundred takes twice as long. Seconds of the members, mean over 64 steps, with equal workers:

- as they come: members in their order, each taken by whoever is free first, which is what the pools do;
- longest first: the same by falling duration, as if it were known. Nobody can know it: a member is a new direction. It
  is the best that any order by a guess, such as the mirrored partner's time, could hope for;
- in halves: every member as two jobs of half the prompts, each with a perturbation of its own;
- second copies: workers without a member begin the one that would end last once more, and the first to end counts;
- least possible: the longest member, or all durations shared out evenly.

And with every fourth worker half as fast: as they come, and with a rule that leaves a member alone for a worker that
would end it sooner, as if speeds and durations were known.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
from typing import Any

import numpy as np
import torch
from bench.common import options, rounded, settings, write_result
from bench.models import qwen_config

from estune.study.estimate.lengths import spread_lengths
from estune.study.estimate.machines import as_device, find_gpu
from estune.study.estimate.needs import Work
from estune.study.estimate.plan import Plan
from estune.study.estimate.schedule import makespan
from estune.study.estimate.shapes import Shape, read_shape
from estune.study.estimate.times import Times

WORKERS = (2, 4, 7, 8, 15, 16, 30)
MOST = 1024


def shape() -> Shape:
    """The sizes of Qwen2.5-7B."""
    with tempfile.TemporaryDirectory() as folder:
        qwen_config("7B", torch.bfloat16, 0.02).save_pretrained(folder)
        return read_shape(folder)


def plan(sizes: Shape, gpu: str, mean: float, prompts: int, population: int) -> Plan:
    """Steps of so many members and prompts."""
    work = Work(population, prompts, 120, mean, MOST, prompts, 1536, 1, "bfloat16", captured=True)
    return Plan(Times(sizes, work, as_device(find_gpu(gpu), "bfloat16")), spread_lengths(mean, MOST))


def second_copies(members: np.ndarray[Any, Any], usual: np.ndarray[Any, Any], workers: int) -> float:
    """Seconds until the last member of a step ends, where idle workers begin others' members anew."""
    free = [(0.0, worker) for worker in range(workers)]
    ends: list[float] = []
    for duration in members:
        at, worker = heapq.heappop(free)
        ends.append(at + duration)
        heapq.heappush(free, (at + duration, worker))
    copied: set[int] = set()
    for at, _ in sorted(free):
        last = int(np.argmax(ends))
        if last not in copied and at + usual[last] < ends[last]:
            copied.add(last)
            ends[last] = at + usual[last]
    return max(ends)


def unlike(members: np.ndarray[Any, Any], speeds: np.ndarray[Any, Any], *, wait: bool) -> float:
    """Seconds of a step on workers of these speeds; with `wait` one may leave a member to who would end it sooner."""
    free = np.zeros(len(speeds))
    for duration in members:
        worker = int(np.argmin(free + duration / speeds if wait else free))
        free[worker] += duration / speeds[worker]
    return float(free.max())


def main(arguments: argparse.Namespace) -> None:
    """Play, print and keep."""
    sizes = shape()
    whole = plan(sizes, arguments.gpu, arguments.new_tokens, arguments.prompts, arguments.population)
    halves = plan(sizes, arguments.gpu, arguments.new_tokens, arguments.prompts // 2, 2 * arguments.population)
    jobs = whole.jobs(1)
    members = jobs.seconds
    usual = np.minimum(members, jobs.taken + jobs.read + jobs.generated)
    print(f"a member: {members.mean():.3g} s, standard deviation {usual.std():.2g} s without stragglers")
    found = {}
    for workers in WORKERS:
        speeds = np.where(np.arange(workers) % 4 == 3, 0.5, 1.0)
        seconds = {
            "as they come": makespan(members, workers).mean(),
            "longest first": makespan(np.sort(members)[:, ::-1], workers).mean(),
            "in halves": makespan(halves.jobs(1).seconds, workers).mean(),
            "second copies": np.mean([second_copies(m, u, workers) for m, u in zip(members, usual, strict=True)]),
            "least possible": np.maximum(members.max(axis=1), members.sum(axis=1) / workers).mean(),
            "every fourth half as fast": np.mean([unlike(m, speeds, wait=False) for m in members]),
            "and left for faster ones": np.mean([unlike(m, speeds, wait=True) for m in members]),
        }
        found[str(workers)] = {name: float(value) for name, value in seconds.items()}
    write_result("tails", {"settings": settings(arguments), "workers": rounded(found)}, arguments.results)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--new-tokens", type=float, default=300)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=200)
    main(parser.parse_args())

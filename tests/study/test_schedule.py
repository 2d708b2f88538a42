"""Members over workers: known answers, and what must hold of any."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estune.study.estimate.plan import STRAGGLERS, Plan
from estune.study.estimate.schedule import finish, makespan
from estune.study.estimate.times import Times
from tests.sizes import FAST, ROUND, make_work

durations = st.lists(st.floats(0.1, 100), min_size=1, max_size=20)


@given(durations, st.integers(1, 25))
def test_each_is_taken_by_whoever_is_free_first(times: list[float], workers: int) -> None:
    free = [0.0] * workers
    ends = []
    for time in times:
        ends.append(heapq.heappop(free) + time)
        heapq.heappush(free, ends[-1])
    assert finish(np.array([times, times]), workers).tolist() == [pytest.approx(ends)] * 2


@given(durations)
def test_more_workers_never_take_longer(times: list[float]) -> None:
    jobs = np.array(times)
    found = [float(makespan(jobs, workers)) for workers in range(1, 25)]
    for workers, (fewer, more) in enumerate(itertools.pairwise(found), 2):
        assert more <= fewer * (1 + 1e-12)
        assert more >= max(*times, sum(times) / workers) * (1 - 1e-12)


def test_known_schedules() -> None:
    for members, workers in [(30, 7), (30, 30), (30, 31), (1, 1024), (7, 3)]:
        assert makespan(np.full(members, 2.0), workers) == 2 * math.ceil(members / workers)
    jobs = np.array([5.0, 1, 1, 1, 9])
    assert makespan(jobs, 1) == 17
    assert makespan(jobs, 1024) == 9
    assert finish(jobs, 2).tolist() == [5, 1, 2, 3, 12]  # the long one comes last
    assert makespan(np.sort(jobs)[::-1].copy(), 2) == 9  # longest first


def test_a_plan_by_hand() -> None:
    # Completions of one length: a member takes 10 ms to perturb and 202 ms to generate, but for stragglers.
    work = make_work(population=30, steps=100, evaluations=2, evaluated=300)
    plan = Plan(Times(ROUND, work, FAST), np.full(1, 101.0))
    seconds = plan.jobs(1).seconds
    member = seconds.min()
    assert member == pytest.approx(0.010 + 101 * 0.002, rel=0.01)
    assert set((seconds / member).round(6).ravel()) == {1.0, 2.0}
    assert (seconds > member).mean() == pytest.approx(STRAGGLERS, abs=0.01)
    seconds[:] = member
    update = 30 * 0.010
    scales = {scale.workers: scale for scale in plan.scales()}
    assert sorted(scales) == [1 << i for i in range(11)]
    assert scales[1].step == pytest.approx(30 * member + update)
    assert scales[8].step == pytest.approx(4 * member + update)
    assert scales[1024].step == pytest.approx(member + update)
    assert scales[8].efficiency == pytest.approx(scales[1].step / (8 * scales[8].step))
    assert scales[8].tokens_per_second == pytest.approx(30 * 4 * 101 / scales[8].step)
    # 300 prompts of an evaluation are 3 batches of 100, each 25 batches of 4.
    evaluation = 25 * 101 * 0.002
    assert scales[8].days * 86400 == pytest.approx(100 * scales[8].step + 2 * evaluation, rel=0.01)
    assert scales[1].days * 86400 == pytest.approx(100 * scales[1].step + 6 * evaluation, rel=0.01)
    assert scales[8].device_hours == pytest.approx(8 * 24 * scales[8].days)


def test_a_plan_is_the_same_every_time() -> None:
    lengths = np.arange(1.0, 102)
    one, two = (Plan(Times(ROUND, make_work(workers=3), FAST), lengths) for _ in range(2))
    assert one.scales() == two.scales()
    assert [scale.workers for scale in one.scales()][:4] == [1, 2, 3, 4]
    assert sum(item.amount for item in one.items()) == pytest.approx(one.step(3))

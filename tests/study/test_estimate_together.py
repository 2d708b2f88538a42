"""Members that are decoded together, in an estimate: against what real engines take, and sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estune.completion import Sampling
from estune.config import Config, load
from estune.engines.cpu.members import Members
from estune.engines.together import RowsTogether
from estune.engines.vllm.engine import slots_for
from estune.es.strategy import Member
from estune.pool.replica import Replica, drawn
from estune.study.estimate.estimate import choices
from estune.study.estimate.needs import memory
from estune.study.estimate.plan import Plan
from estune.study.estimate.run import estimate_run
from estune.study.estimate.shapes import read_shape
from estune.study.estimate.times import Times
from estune.weights.weights import Weights
from tests.sizes import FAST, QWEN_HALF_B, ROUND, amounts, make_work, write_config

ALONE = ["device=cpu", "replicas=1", "threads=1"]
SMALL = {**QWEN_HALF_B, "num_hidden_layers": 2}
SHAPE = replace(ROUND, sides=9 * 10**5, flat=10**5, tensors=10, joins=True)


@pytest.mark.parametrize("rank", [1, 4])
def test_members_and_their_vectors_are_those_of_the_real_objects(rank: int) -> None:
    given = [f"noise=rank{rank}", *ALONE]
    replica = Replica(load(None, given))
    assert isinstance(replica.weights, Weights)
    drawer = replica.engine.together(drawn(replica.weights))  # type: ignore[attr-defined]
    for prompts, population in ((20, 20), (1, 30), (3, 1000), (300, 4)):
        found = estimate_run(None, [*given, f"population={population}", f"prompts_per_step={prompts}"])
        assert found.work.way == "fused"
        assert found.work.together == replica.at_once([[1] * 9] * prompts, Sampling(40), population)
    held = drawer.of([Member(seed) for seed in range(7)], 0.01)
    assert isinstance(held, Members)
    arrays = [a for parts in held.matrices.values() for part in parts for a in (part.a, part.b)]
    arrays += [*held.biases.values(), *held.norms.values()]
    work = make_work(dtype="float32", rank=rank, way="fused", together=7)
    assert amounts(memory(read_shape("tiny"), work, FAST, 1024))["noise"] == sum(a.nbytes for a in arrays)


def test_vectors_of_a_models_own_forward_are_those_that_it_holds() -> None:
    replica = Replica(load(None, ["noise=rank2", *ALONE]))
    assert isinstance(replica.weights, Weights)
    rows = RowsTogether(replica.engine.model, drawn(replica.weights))  # type: ignore[attr-defined]
    shape = read_shape("tiny")
    assert rows.member_bytes == 4 * (shape.vectors(2) + 2 * 2)  # of four numbers each: the table's 614 rows take 616
    assert shape.tensors == len(replica.weights.parameters)


def test_noise_that_lets_members_be_decoded_together_is_shown_beside() -> None:
    few = ["device=cpu", "replicas=1", "population=64", "prompts_per_step=4"]
    own, together = estimate_run(None, few).speeds  # by the same rates of this machine
    assert (own.engine, together.engine) == ("transformers", "transformers, noise=rank1")
    assert together.step < own.step
    assert len(estimate_run(None, [*few, "prompts_per_step=300"]).speeds) == 1  # a member's prompts fill a batch
    assert len(estimate_run(None, [*few, "weights=int8"]).speeds) == 1  # which takes no other noise


def test_a_step_of_members_together_by_hand() -> None:
    work = make_work(rank=1, way="forward", together=4, rows=16)
    plan = Plan(Times(SHAPE, work, FAST), np.full(1, 101.0))
    found = amounts(plan.items())
    # Of 10 members there are batches of 4, 4 and 2. A token takes 2 ms, in which 2 GB of weights are read.
    assert found["generate"] == pytest.approx(3 * 100 * 0.002, rel=0.02)
    assert found["read the prompts"] == pytest.approx(3 * 0.002, rel=0.02)
    # Once 4 GB are read and 2 written, and of each member 10^6 numbers are drawn, 10 us.
    assert found["perturb"] == pytest.approx(0.006 + 10 * 1e-5)
    assert plan.speed().rows == 16
    # 4 members of 10^6 numbers of 2 bytes.
    assert amounts(memory(SHAPE, work, FAST, 100))["noise"] == 8e6
    alone = amounts(Plan(Times(SHAPE, replace(work, way="one by one", together=1), FAST), np.full(1, 101.0)).items())
    assert alone["generate"] == pytest.approx(10 * 100 * 0.002, rel=0.02)


def test_no_engine_is_given_more_than_its_part() -> None:
    shared = make_work(way="fused", together=8)
    assert [shared.members_of_job(engines) for engines in (1, 2, 3, 10)] == [8, 5, 4, 1]
    fixed = make_work(way="forward", together=8)
    assert fixed.members_of_job(10) == 8
    # Three engines of 4, 4 and 2 members are as long at it as the one with 4.
    plan = Plan(Times(SHAPE, replace(shared, at_once=3), replace(FAST, is_gpu=False)), np.full(1, 101.0))
    assert len(plan.jobs(3).taken) == 3


def test_rows_with_vectors_of_their_own_take_time_on_a_cpu() -> None:
    cpu = replace(FAST, is_gpu=False, outer=1e9)
    work = make_work(rank=1, way="fused", together=4, rows=16)
    (alone,), (added,) = (
        Times(SHAPE, each, cpu).generate(np.full((1, 16), 2.0))
        for each in (replace(work, way="one by one", together=1), work)
    )
    assert added - alone == pytest.approx(16 * 2 * 1e6 / 1e9, rel=0.01)
    of_four = Times(SHAPE, replace(work, rank=4), cpu).generate(np.full((1, 16), 2.0))[0]
    assert of_four - alone == pytest.approx(16 * 2 * (4 * 9e5 + 1e5) / 1e9, rel=0.01)


def test_nothing_is_patched_where_nothing_is_perturbed(tmp_path: Path) -> None:
    model = write_config(tmp_path, SMALL)
    options = [f"model={model}", "noise=rank1", "population=8", "prompts_per_step=8", "weights=exact_inplace"]
    found = estimate_run(None, options, gpu="h100")
    assert amounts(found.memory)["base (weights=exact_inplace)"] == 0
    assert (found.work.way, found.work.together, found.work.rows) == ("forward", 8, 200)  # 200 of an evaluation
    one_by_one = {choice.name: choice.needed for choice in choices(found.shape, found.work, found.device, 1024)}
    assert one_by_one["weights=inplace"] == one_by_one["weights=exact_inplace"] - 8 * found.shape.vectors(1) * 2


def test_who_is_decoded_alone(tmp_path: Path) -> None:
    qwen = write_config(tmp_path / "qwen", SMALL)
    mamba = write_config(tmp_path / "mamba", {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2})
    for model, options, way in (
        (qwen, [], "forward"),
        (qwen, ["weights=inplace"], "one by one"),
        (qwen, ["noise=iid"], "one by one"),
        (qwen, ["workers=2"], "one by one"),
        (qwen, ["engine=vllm"], "one by one"),
        (qwen, ["adapter.rank=4"], "one by one"),
        (mamba, [], "one by one"),
    ):
        found = estimate_run(None, [f"model={model}", "noise=rank1", *options], gpu="h100")
        assert found.work.way == way, options


def test_adapters_in_vllm_are_decoded_in_slots(tmp_path: Path) -> None:
    model = write_config(tmp_path, SMALL)
    options = [f"model={model}", "engine=vllm", "adapter.rank=8", "prompts_per_step=32", "dtype=bfloat16"]
    config: Config = load(None, options)
    found = estimate_run(None, options, gpu="h100", new_tokens=100)
    vllm, ours = found.speeds
    assert found.work.together == slots_for(config, on_cpu=False) == 30
    assert (vllm.rows, found.work.way) == (960, "slots")
    added = found.shape.trained
    assert amounts(found.memory)["members' adapters"] == 30 * added * 2 + 4 * added
    assert vllm.step < ours.step / 5
    fewer = estimate_run(None, [*options, "vllm_max_loras=4"], gpu="h100", new_tokens=100)
    assert (fewer.work.together, fewer.speeds[0].rows) == (4, 256)
    assert vllm.step < fewer.speeds[0].step < ours.step

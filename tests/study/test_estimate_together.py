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
from estune.study.estimate.machines import Device
from estune.study.estimate.needs import memory
from estune.study.estimate.plan import Plan
from estune.study.estimate.run import estimate_run
from estune.study.estimate.shapes import read_shape
from estune.study.estimate.times import VLLM_STEP, Times
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
        (qwen, ["engine=vllm"], "low-rank slots"),
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


def test_low_rank_members_in_slots_by_hand() -> None:
    # Of 900,000 rows and columns 700,000 are of layers, and 100,000 elements are of vectors.
    shape = replace(SHAPE, layered=7 * 10**5, vocabulary=10**5, hidden=10**4, output=10**9)
    work = make_work(engine="vllm", rank=1, way="low-rank slots", together=4, rows=16)
    one, eight = (amounts(memory(shape, replace(work, rank=rank), FAST, 100))["members in slots"] for rank in (1, 2))
    # Four slots of the layers, five of the rest in bfloat16, and a member's vectors in float32. Of rank two, layers
    # have room for eight.
    assert one == 2 * (4 * 700_000 + 5 * 300_000) + 4 * 1_000_000
    assert eight == 2 * (4 * 8 * 700_000 + 5 * (2 * 200_000 + 100_000)) + 4 * (2 * 900_000 + 100_000)
    split = amounts(memory(shape, replace(work, parallel=2), FAST, 100))["members in slots"]
    assert split == 4 * 700_000 + 5 * 300_000 + 4 * 1_000_000
    found = amounts(Plan(Times(shape, work, FAST), np.full(1, 101.0)).items())
    # Batches of 4, 4 and 2 members. A token takes 4 ms, in which 4 GB of weights are read, and 0.3 beside its kernels.
    assert found["generate"] == pytest.approx(3 * 100 * (0.004 + VLLM_STEP), rel=0.02)
    assert found["perturb"] == pytest.approx(0.006 + 10 * 1e-5)  # as where a model's own forward decodes them
    gap = replace(FAST, gap=1e-6)
    alone = replace(work, way="one by one", together=1)
    (slow,), (quick,) = (Times(shape, each, gap).generate(np.full((1, 16), 2.0)) for each in (work, alone))
    # Ten kernels more in each of 10 layers, and of four members a million elements are read.
    assert slow - quick == pytest.approx(100e-6 + 4 * 2 * 1e6 / 1e12)


def test_products_of_low_rank_members_in_slots_by_hand() -> None:
    shape = replace(SHAPE, layered=7 * 10**5, vocabulary=10**5, hidden=10**4)
    gpu = replace(FAST, bandwidth=1e30, decode=1e12)
    cpu = replace(gpu, is_gpu=False, outer=1e9)
    work = make_work(engine="vllm", rank=1, way="low-rank slots", together=4, rows=16)

    def added(rank: int, device: Device) -> float:
        ways = replace(work, rank=rank), replace(work, way="one by one", together=1)
        (beside,), (without,) = (Times(shape, each, device).generate(np.full((1, 16), 2.0)) for each in ways)
        return float(beside - without)

    # A row multiplies its member's vectors, of layers 8 times as many beyond rank one, and the head's of all slots.
    assert added(1, gpu) == pytest.approx(2 * 16 * (700_000 + 5 * 110_000) / 1e12)
    assert added(2, gpu) == pytest.approx(2 * 16 * (8 * 700_000 + 5 * 2 * 110_000) / 1e12)
    # On a CPU those of rank one are added element by element.
    assert added(1, cpu) == pytest.approx(added(1, gpu) + 2 * 16 * 700_000 / 1e9)
    assert added(2, cpu) == added(2, gpu)


def test_which_low_rank_members_vllm_has_slots_for(tmp_path: Path) -> None:
    qwen = write_config(tmp_path / "qwen", SMALL)
    moe = write_config(tmp_path / "moe", {**SMALL, "model_type": "qwen3_moe", "num_experts": 8})
    low_rank = ["noise=rank1", "engine=vllm", "population=12", "prompts_per_step=8"]
    for model, options, together in (
        (qwen, [], 12),
        (qwen, ["train_parameters=*_proj.weight", "noise=rank8"], 12),
        (qwen, ["weights=exact_inplace"], 12),
        (qwen, ["workers=2"], 6),
        (qwen, ["prompt_groups=2"], 6),
        (qwen, ["vllm_max_loras=5"], 5),
        (qwen, ["vllm_max_loras=1"], 1),
        (qwen, ["train_parameters=*norm.weight"], 1),
        (qwen, ["weights=inplace"], 1),
        (qwen, ["dtype=float32"], 1),
        (qwen, ["workers_at=http://there:8000"], 1),
        (moe, [], 1),
        (moe, ["train_parameters=*_proj.weight,!*.experts.*"], 12),
    ):
        found = estimate_run(None, [f"model={model}", *low_rank, *options], gpu="h100").work
        assert (found.way, found.together) == ("low-rank slots" if together > 1 else "one by one", together), options
    on_cpu = estimate_run(None, ["model=tiny", *low_rank, "dtype=float32", "device=cpu", "threads=1"]).work
    assert (on_cpu.way, on_cpu.together) == ("low-rank slots", 12)


def test_splits_have_slots_for_as_many_members_as_they_have(tmp_path: Path) -> None:
    model = write_config(tmp_path, SMALL)
    options = [f"model={model}", "engine=vllm", "noise=rank1", "population=8", "prompts_per_step=64"]
    found = estimate_run(None, options, gpu="h100", new_tokens=100)
    few, *_, many = found.splits
    assert (few.population, found.work.together, many.population) == (2, 8, 32)
    # All have the same completions in one batch: with more members a little more is read and drawn.
    assert few.step < many.step < 1.5 * few.step

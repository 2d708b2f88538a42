"""Memory and time of a run against sums done by hand and what real objects take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.config import Config
from estune.engines.memory import total_memory
from estune.engines.transformers import MAX_ROWS, MEMORY_SHARE
from estune.pool.replica import Replica
from estune.study.estimate.estimate import choices
from estune.study.estimate.machines import Device
from estune.study.estimate.needs import fitting_rows, memory, memory_of_all, step_time, total
from estune.study.estimate.shapes import read_shape
from estune.weights.checkpoint import EMBEDDED
from tests.sizes import FAST, ROUND, amounts, make_work


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["master", "copy", "inplace"])
def test_bytes_are_those_of_the_real_objects(policy: Any, dtype: str) -> None:
    replica = Replica(Config(device="cpu", weights=policy, dtype=dtype, replicas=1, threads=1))
    parameters = list(replica.engine.model.parameters())
    live = {parameter.data_ptr() for parameter in parameters}
    base = [array for array in replica.weights.base.values() if array.ctypes.data not in live]
    work = make_work(policy=policy, dtype=dtype)
    estimated = amounts(memory(read_shape("tiny"), work, FAST, 1024))
    assert estimated["live weights"] == sum(parameter.nbytes for parameter in parameters)
    assert estimated[f"base (weights={policy})"] == sum(array.nbytes for array in base)


def test_cache_is_that_of_a_real_forward() -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED["tiny"], dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.zeros(3, 20, dtype=torch.int64), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    work = make_work(rows=3, slots=20, dtype="float32")
    assert amounts(memory(read_shape("tiny"), work, FAST, 1024))["key and value cache"] == real


def test_rows_are_those_that_the_engine_takes() -> None:
    replica = Replica(Config(device="cpu", replicas=1, threads=1))
    shape, machine = read_shape("tiny"), total_memory(torch.device("cpu"))
    for slots in (100, 50_000, 400_000):
        work = make_work(prompt_tokens=slots // 2, max_new_tokens=slots // 2, slots=2 * slots, dtype="float32")
        rows = fitting_rows(shape, work, machine, share=MEMORY_SHARE, most=MAX_ROWS["cpu"])
        assert rows == replica.engine.fitting_rows(slots)


def test_memory_by_hand() -> None:
    found = amounts(memory(ROUND, make_work(), FAST, prefill_tokens=100))
    assert found == {
        "live weights": 2e9,
        "base (weights=master)": 4e9,
        "noise": 0,
        "key and value cache": 4 * 151 * 1000 * 2,
        "logits": 4 * 1000 * 12,
        "activations": 100 * (4 * 1000 + 3 * 4000) * 2,
        "the process": 1e9,
    }
    on_host = amounts(memory(ROUND, make_work(base="host"), FAST, prefill_tokens=100))
    assert on_host == {**found, "base (weights=master)": 0}


def test_replicas_on_a_cpu_have_one_base() -> None:
    cpu = replace(FAST, is_gpu=False)
    one = total(memory(ROUND, make_work(), cpu, 100))
    assert memory_of_all(ROUND, make_work(), cpu, 100) == one
    for policy, base in (("master", 4e9), ("copy", 2e9)):
        alone = total(memory(ROUND, make_work(policy=policy), cpu, 100))
        work = make_work(policy=policy, at_once=3)
        assert memory_of_all(ROUND, work, cpu, 100) == 3 * alone - 2 * base
        chosen = next(c for c in choices(ROUND, work, cpu, 100) if c.name == f"weights={policy}")
        assert chosen.needed == 3 * alone - 2 * base


def test_replicas_on_a_gpu_have_a_base_each() -> None:
    work = make_work(at_once=3)
    assert memory_of_all(ROUND, work, FAST, 100) == 3 * total(memory(ROUND, work, FAST, 100))
    found = {choice.name: choice for choice in choices(ROUND, work, FAST, 100)}
    assert found["weights=master base_device=host"].host == 3 * 4e9
    assert found["weights=inplace"].needed == total(memory(ROUND, replace(work, policy="inplace"), FAST, 100))


def test_an_engine_split_over_gpus_by_hand() -> None:
    work = make_work(workers=2, parallel=4)
    assert (work.engines, work.places, work.devices) == (2, 2, 8)
    assert amounts(memory(ROUND, work, FAST, prefill_tokens=100)) == {
        "live weights": 0.5e9,
        "base (weights=master)": 1e9,
        "noise": 0,
        "key and value cache": 4 * 151 * 1000 * 2 / 4,
        "logits": 4 * 1000 * 12,
        "activations": 100 * (4 * 1000 + 3 * 1000) * 2,
        "the process": 1e9,
    }
    each = total(memory(ROUND, work, FAST, 100))
    found = {choice.name: choice for choice in choices(ROUND, work, FAST, 100)}
    as_set, host = found["weights=master base_device=device"], found["weights=master base_device=host"]
    assert (as_set.needed, as_set.devices, as_set.fits) == (8 * each, 8, True)
    assert (host.needed, host.host) == (8 * (each - 1e9), 2 * 4e9)
    assert "weights=inplace" not in found  # which workers cannot
    # GRPO: 20 GB of weights and optimizer, and less than 1 GB of all else, are on one of the 8.
    assert (found["GRPO"].devices, found["GRPO"].fits) == (1, True)
    one, split = (amounts(step_time(ROUND, w, FAST)) for w in (make_work(), work))
    # Half the members each, at four times the rates; every engine draws the noise of all members for the update.
    for part, share in (("perturb", 8), ("read the prompts", 8), ("generate", 8), ("update", 4)):
        assert split[part] == pytest.approx(one[part] / share)
    on_host = replace(work, base="host")
    assert amounts(step_time(ROUND, on_host, FAST))["perturb"] == pytest.approx(5 * (0.04 + 0.0005))


def test_workers_that_share_gpus_by_hand() -> None:
    work = make_work(workers=6, at_once=3)
    assert (work.engines, work.places, work.devices) == (6, 2, 2)
    assert memory_of_all(ROUND, work, FAST, 100) == 3 * total(memory(ROUND, work, FAST, 100))
    one, six = (amounts(step_time(ROUND, w, FAST)) for w in (make_work(), work))
    assert six["generate"] == pytest.approx(one["generate"] / 2)  # two GPUs
    assert six["update"] == pytest.approx(3 * one["update"])  # three bases on each


def test_workers_on_a_cpu_have_a_base_each() -> None:
    cpu, work = replace(FAST, is_gpu=False), make_work(workers=3, at_once=3)
    assert memory_of_all(ROUND, work, cpu, 100) == 3 * total(memory(ROUND, work, cpu, 100))
    assert amounts(step_time(ROUND, work, cpu))["update"] == amounts(step_time(ROUND, make_work(), cpu))["update"]


def test_step_by_hand() -> None:
    found = amounts(step_time(ROUND, make_work(), FAST))
    # A member reads 4 and writes 2 GB, 6 ms, and draws 10^9 numbers, 10 ms. An update draws those of all members.
    assert found["perturb"] == pytest.approx(10 * 0.010)
    assert found["update"] == pytest.approx(10 * 0.010)
    # A token of 4 rows multiplies 8 x 10^9, 8 us, and reads 2 GB of weights, 2 ms, with 4 x 100 cached tokens.
    assert found["generate"] == pytest.approx(10 * 100 * 0.002, rel=0.01)
    # 200 tokens of prompts are 0.4 ms of products, less than reading the weights takes.
    assert found["read the prompts"] == pytest.approx(10 * 0.002, rel=0.01)


def test_a_step_follows_what_limits_it() -> None:
    slow = Device("slow", 80 * 10**9, 1e12, 1e12, 1e12, 1e11, 0.001, is_gpu=False, how="")
    # 4 rows multiply 2 x 4 x 10^9: 8 ms, and Python adds 10 layers of 1 ms.
    assert amounts(step_time(ROUND, make_work(), slow))["generate"] == pytest.approx(10 * 100 * 0.018, rel=0.01)
    halves = amounts(step_time(ROUND, make_work(new_tokens=51), slow))["generate"]
    assert halves == pytest.approx(10 * 100 * 0.014, rel=0.01)  # half the rows, on average, over as many tokens
    two = amounts(step_time(ROUND, make_work(at_once=2), slow))
    assert two["generate"] == pytest.approx(5 * 100 * 0.018, rel=0.01)
    assert two["update"] == pytest.approx(10 * 0.010 / 2)  # each replica updates a half of the base
    gpu, one = (amounts(step_time(ROUND, make_work(at_once=n), FAST)) for n in (2, 1))
    assert gpu["update"] == pytest.approx(2 * 10 * 0.010)  # each has a base of its own, and applies all members to it
    assert gpu["generate"] == one["generate"]  # they share what limits it
    batches = amounts(step_time(ROUND, make_work(rows=2), FAST))
    assert batches["generate"] == pytest.approx(2 * 10 * 100 * 0.002, rel=0.01)
    # 4 GB of base over PCIe, at 25 GB/s, before 2 ms of writing.
    assert amounts(step_time(ROUND, make_work(base="host"), FAST))["perturb"] == pytest.approx(10 * (0.16 + 0.002))

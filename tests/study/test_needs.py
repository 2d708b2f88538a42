"""Memory of a run against sums done by hand and what real objects take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.config import Config
from estune.engines.memory import total_memory
from estune.engines.transformers import MAX_ROWS, MEMORY_SHARE
from estune.es.strategy import Member
from estune.pool.replica import Replica
from estune.study.estimate.estimate import choices
from estune.study.estimate.needs import fitting_rows, memory, memory_of_all, total
from estune.study.estimate.shapes import read_shape
from estune.weights.locate import EMBEDDED
from estune.weights.split import SplitBase
from estune.weights.tensors import RUN_LENGTH
from estune.weights.weights import Weights
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


def test_patches_take_what_is_counted_for_them_at_most() -> None:
    weights = Replica(Config(device="cpu", weights="exact_inplace", replicas=1, threads=1)).weights
    assert isinstance(weights, Weights)
    weights.perturb(Member(5), 0.001)
    estimated = amounts(memory(read_shape("tiny"), make_work(policy="exact_inplace", dtype="float32"), FAST, 1024))
    assert weights.storage.patch_bytes < estimated["base (weights=exact_inplace)"] == 4 * weights.elements // 8


def test_halves_and_patches_take_what_is_counted_for_them_at_most() -> None:
    weights = Replica(Config(device="cpu", weights="split_master", dtype="bfloat16", replicas=1, threads=1)).weights
    assert isinstance(weights, Weights)
    weights.perturb(Member(5), 0.001)
    estimated = amounts(memory(read_shape("tiny"), make_work(policy="split_master"), FAST, 1024))
    counted = estimated["base (weights=split_master)"]
    assert counted == 2 * weights.elements + 2 * weights.elements // 8
    lower = sum(SplitBase.of(p.tensor.view(-1), RUN_LENGTH).lower.nbytes for p in weights.parameters)
    assert weights.storage.patch_bytes < counted - lower < counted / 8


def test_halves_are_offered_where_weights_generate_in_bfloat16() -> None:
    for dtype, offered in (("bfloat16", True), ("float32", False)):
        found = {choice.name: choice.needed for choice in choices(ROUND, make_work(dtype=dtype), FAST, 100)}
        assert ("weights=split_master" in found) is offered
        if offered:
            assert found["weights=split_master"] == found["weights=inplace"] + 2e9 + 2e9 / 8
    adapted = choices(replace(ROUND, adapted=True), make_work(dtype="bfloat16"), FAST, 100)
    assert "weights=split_master" not in {choice.name for choice in adapted}


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
    assert found["weights=exact_inplace"].needed == 8 * (each - 1e9 + 2e9 / 8 / 4)
    assert "weights=inplace" not in found  # which workers cannot
    # GRPO: 20 GB of weights and optimizer, and less than 1 GB of all else, are on one of the 8.
    assert (found["GRPO"].devices, found["GRPO"].fits) == (1, True)


def test_workers_that_share_gpus_by_hand() -> None:
    work = make_work(workers=6, at_once=3)
    assert (work.engines, work.places, work.devices) == (6, 2, 2)
    assert memory_of_all(ROUND, work, FAST, 100) == 3 * total(memory(ROUND, work, FAST, 100))


def test_workers_on_a_cpu_have_a_base_each() -> None:
    cpu, work = replace(FAST, is_gpu=False), make_work(workers=3, at_once=3)
    assert memory_of_all(ROUND, work, cpu, 100) == 3 * total(memory(ROUND, work, cpu, 100))

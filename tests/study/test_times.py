"""Times of a step's parts against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from estune.study.estimate.machines import PCIE, Device, as_device, find_gpu
from estune.study.estimate.needs import Work
from estune.study.estimate.plan import Plan
from estune.study.estimate.times import EXCHANGE, VLLM_KERNELS, VLLM_STEP, Times
from tests.sizes import FAST, ROUND, amounts, make_work

SLOW = Device("slow", 80 * 10**9, 1e12, 1e12, 1e12, 1e11, 0.001, is_gpu=False, how="")


def parts(work: Work, device: Device = FAST) -> dict[str, float]:
    """Seconds of a step's parts, all completions being as long as those of `work` on average."""
    return amounts(Plan(Times(ROUND, work, device), np.full(1, float(work.new_tokens))).items())


def generate(work: Work, lengths: list[float], device: Device = FAST) -> float:
    """Seconds in which a member's completions of these lengths are generated."""
    (found,) = Times(ROUND, work, device).generate(np.array([lengths], float))
    return float(found)


def test_a_step_by_hand() -> None:
    found = parts(make_work())
    # A member reads 4 and writes 2 GB, 6 ms, and draws 10^9 numbers, 10 ms. An update draws those of all members.
    assert found["perturb"] == pytest.approx(10 * 0.010)
    assert found["update"] == pytest.approx(10 * 0.010)
    # A token of 4 rows multiplies 8 x 10^9, 8 us, and reads 2 GB of weights, 2 ms, with 4 x 100 cached tokens.
    assert found["generate"] == pytest.approx(10 * 100 * 0.002, rel=0.01)
    # 200 tokens of prompts are 0.4 ms of products, less than reading the weights takes.
    assert found["read the prompts"] == pytest.approx(10 * 0.002, rel=0.01)


def test_a_step_follows_what_limits_it() -> None:
    # 4 rows multiply 2 x 4 x 10^9: 8 ms, and Python adds 10 layers of 1 ms.
    assert parts(make_work(), SLOW)["generate"] == pytest.approx(10 * 100 * 0.018, rel=0.01)
    two = parts(make_work(at_once=2), SLOW)
    assert two["generate"] == pytest.approx(5 * 100 * 0.018, rel=0.01)
    assert two["update"] == pytest.approx(10 * 0.010 / 2)  # each replica updates a half of the base
    gpu, one = (parts(make_work(at_once=n)) for n in (2, 1))
    assert gpu["update"] == pytest.approx(2 * 10 * 0.010)  # each has a base of its own, and applies all members to it
    assert gpu["generate"] == one["generate"]  # they share what limits it
    assert parts(make_work(rows=2))["generate"] == pytest.approx(2 * 10 * 100 * 0.002, rel=0.01)
    # 4 GB of base over PCIe, at 25 GB/s, before 2 ms of writing.
    assert parts(make_work(base="host"))["perturb"] == pytest.approx(10 * (4e9 / PCIE + 0.002))


def test_rows_leave_the_batch_as_they_end() -> None:
    # 25 tokens each of 4, 3, 2 and 1 rows: 2 ms of products a row, and 10 ms of Python.
    assert generate(make_work(), [76, 26, 101, 51], SLOW) == pytest.approx(
        25 * (0.018 + 0.016 + 0.014 + 0.012), rel=0.01
    )
    # Two batches of two, of which the first lasts 75 tokens and the second 100.
    halves = 25 * (0.014 + 0.012 + 0.012) + 50 * 0.014 + 50 * 0.012
    assert generate(make_work(rows=2), [76, 26, 101, 51], SLOW) == pytest.approx(halves, rel=0.01)
    # In vLLM the next prompt is let in where one has ended: after 25 tokens one of 100, after 75 one of 50, so that the
    # last two end together.
    vllm = make_work(rows=2, engine="vllm")
    assert generate(vllm, [76, 26, 101, 51], SLOW) == pytest.approx(125 * 0.014, rel=0.01)
    assert generate(vllm, [101, 26, 26], SLOW) == pytest.approx(50 * 0.014 + 50 * 0.012, rel=0.01)


def test_a_captured_step_reads_rows_and_slots_rounded_up() -> None:
    # Weights that weigh nothing, and a cache of 10^6 elements: what is read is the cache alone.
    shape = replace(ROUND, matrices=1, active=1, cached=10**6)
    lengths = np.full((1, 3), 2.0)
    plain, captured = (Times(shape, make_work(prompts=3, captured=c), FAST).generate(lengths)[0] for c in (False, True))
    assert captured == pytest.approx(plain * 4 / 3 * 7 / 6, rel=0.001)


def test_kernels_take_time_by_hand() -> None:
    gpu: Any = replace(FAST, gap=1e-6, issue=1e-4)
    # 120 kernels: 100 of the model and 20 that choose a token. Captured they add 120 us to the 2 ms of reading; asked
    # for one by one they take 12 ms, in which all else is done.
    token = 0.0020008
    captured, eager = (make_work(captured=c) for c in (True, False))
    assert generate(captured, [2, 2, 2, 2], gpu) == pytest.approx(token + 120e-6, rel=0.001)
    assert generate(eager, [2, 2, 2, 2], gpu) == pytest.approx(0.012, rel=0.001)
    # Of two processes on the GPU, one asks while the other's kernels run.
    assert generate(replace(eager, at_once=2), [2, 2, 2, 2], gpu) == pytest.approx(0.006, rel=0.001)
    assert generate(replace(captured, at_once=2), [2, 2, 2, 2], gpu) == pytest.approx(token + 120e-6, rel=0.001)
    vllm = replace(captured, engine="vllm")
    assert generate(vllm, [2, 2, 2, 2], gpu) == pytest.approx(token + 10 * VLLM_KERNELS * 1e-6 + VLLM_STEP, rel=0.001)
    assert Times(ROUND, captured, replace(gpu, gap=1e-4)).token(4, 1)[1] == "launching kernels"


def test_a_known_gpu_takes_what_was_measured() -> None:
    # Llama 3.1 8B on an H100, one row: 8.4 ms a token operation by operation, and 5.1 from a CUDA graph, which was 94%
    # of the bandwidth, of which 75% are counted on here.
    llama = replace(
        ROUND,
        parameters=8_030_261_248,
        matrices=6_979_321_856,
        active=6_979_321_856,
        output=525_336_576,
        cached=65_536,
        layers=32,
        kernels=1398,
    )
    h100 = as_device(find_gpu("h100"), "bfloat16")
    eager, captured = (
        Times(llama, make_work(prompts=1, rows=1, captured=c), h100).token(1, 100)[0] for c in (False, True)
    )
    assert eager == pytest.approx(0.0084, rel=0.05)
    assert 0.0051 < captured < eager


@pytest.mark.parametrize(
    ("matrices", "output", "cached", "layers", "gpu", "gpus", "milliseconds"),
    [
        # Llama 3.1 8B (yobitelcomm.github.io/bench, and johnmusgrave.com: 75 tokens a second)
        (6_979_321_856, 525_336_576, 65_536, 32, "h100", 1, 6.48),
        (6_979_321_856, 525_336_576, 65_536, 32, "a100-40", 1, 13.3),
        # Qwen2.5 7B and 72B (github.com/tenstorrent/tt-inference-server, issues 125 and 143)
        (6_525_621_760, 544_997_376, 28_672, 28, "rtx4090", 1, 17.1),
        (70_214_787_072, 1_245_708_288, 163_840, 80, "h100", 2, 30.9),
    ],
)
def test_a_row_of_vllm_takes_what_others_measured(
    matrices: int, output: int, cached: int, layers: int, gpu: str, gpus: int, milliseconds: float
) -> None:
    shape = replace(ROUND, matrices=matrices, active=matrices, output=output, cached=cached, layers=layers)
    work = make_work(engine="vllm", captured=True, prompts=1, rows=1, prompt_tokens=128, parallel=gpus)
    found = 1e3 * Times(shape, work, as_device(find_gpu(gpu), "bfloat16")).token(1, 64)[0]
    assert milliseconds <= found <= 1.15 * milliseconds


def test_engines_split_over_gpus_by_hand() -> None:
    one, split = (parts(w) for w in (make_work(), make_work(workers=2, parallel=4)))
    # Half the members each, at four times the rates; every engine draws the noise of all members for the update.
    # Twice in each of 10 layers results are exchanged.
    for part, share, forwards in (
        ("perturb", 8, 0),
        ("read the prompts", 8, 5),
        ("generate", 8, 500),
        ("update", 4, 0),
    ):
        assert split[part] == pytest.approx(one[part] / share + forwards * 20 * EXCHANGE)
    on_host = make_work(workers=2, parallel=4, base="host")
    assert parts(on_host)["perturb"] == pytest.approx(5 * (0.04 + 0.0005))


def test_workers_that_share_gpus_by_hand() -> None:
    one, six = (parts(w) for w in (make_work(), make_work(workers=6, at_once=3)))
    assert six["generate"] == pytest.approx(one["generate"] / 2)  # two GPUs
    assert six["update"] == pytest.approx(3 * one["update"])  # three bases on each


def test_workers_on_a_cpu_update_a_base_each() -> None:
    cpu = replace(FAST, is_gpu=False)
    assert parts(make_work(workers=3, at_once=3), cpu)["update"] == parts(make_work(), cpu)["update"]

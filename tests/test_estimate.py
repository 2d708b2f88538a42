"""The estimate against published sizes, sums done by hand, and what real objects take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.checkpoint import EMBEDDED
from estune.commands import estimate_run
from estune.config import Config
from estune.devices import GPUS, Device, as_device, find_gpu, recognise
from estune.engines.memory import total_memory
from estune.engines.transformers import MAX_ROWS, MEMORY_SHARE
from estune.errors import EstuneError
from estune.estimate import (
    Choice,
    Item,
    Work,
    choices,
    fitting_rows,
    memory,
    memory_of_all,
    reinforcement_learning,
    step_time,
    total,
)
from estune.replica import Replica
from estune.shapes import Shape, read_shape
from tests.models import build_config
from tests.test_cli import estune, refused

QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN_HALF_B = {
    **QWEN_7B,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_7B = {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
QWEN3_HALF_B = {
    **QWEN_HALF_B,
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GEMMA2_2B = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
# All weights 1,000 million, none of them embeddings; 10 layers; 1,000 elements cached a token.
ROUND = Shape(
    parameters=10**9,
    trained=10**9,
    matrices=10**9,
    active=10**9,
    output=0,
    cached=1000,
    grouped=1,
    layers=10,
    hidden=1000,
    width=4000,
    vocabulary=1000,
    dtype="bfloat16",
)
# Reads 10^12 bytes, multiplies 10^15 and draws 10^11 numbers a second.
FAST = Device("fast", 80 * 10**9, 1e12, 1e15, 1e15, 1e11, 0.0, is_gpu=True, how="")


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_work(**changes: Any) -> Work:
    settings: dict[str, Any] = {
        "population": 10,
        "prompts": 4,
        "prompt_tokens": 50,
        "new_tokens": 101,
        "max_new_tokens": 101,
        "rows": 4,
        "slots": 151,
        "at_once": 1,
        "dtype": "bfloat16",
    }
    return Work(**{**settings, **changes})


def amounts(items: list[Item]) -> dict[str, float]:
    return {item.name: item.amount for item in items}


@pytest.mark.parametrize(
    ("config", "parameters", "cache"),
    [
        # As the models' cards and safetensors indices count them; 2 x layers x heads x head_dim x 2 bytes by hand.
        (QWEN_HALF_B, 494_032_768, 2 * 24 * 2 * 64 * 2),
        (QWEN_7B, 7_615_616_512, 57_344),
        (LLAMA_8B, 8_030_261_248, 131_072),
        (LLAMA_70B, 70_553_706_496, 327_680),
        (MISTRAL_7B, 7_241_732_096, 131_072),
        (QWEN3_HALF_B, 596_049_920, 114_688),
        (GEMMA2_2B, 2_614_341_888, 2 * 26 * 4 * 256 * 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_sizes_are_the_published_ones(tmp_path: Path, config: dict[str, Any], parameters: int, cache: int) -> None:
    shape = read_shape(write_config(tmp_path, config))
    assert shape.parameters == shape.trained == parameters
    assert 2 * shape.cached == cache
    assert shape.dtype == config.get("torch_dtype", config.get("dtype"))


def test_products_leave_embeddings_out(tmp_path: Path) -> None:
    tied = read_shape(write_config(tmp_path, QWEN_HALF_B))
    layer = 896 * (896 + 2 * 128 + 896) + 3 * 896 * 4864
    assert tied.matrices == tied.active == 24 * layer
    assert tied.output == 896 * 151936
    untied = read_shape(write_config(tmp_path, {**QWEN_HALF_B, "tie_word_embeddings": False}))
    assert (untied.matrices, untied.output) == (tied.matrices, tied.output)
    assert untied.parameters == tied.parameters + 896 * 151936
    assert (tied.grouped, tied.layers, tied.hidden, tied.width, tied.vocabulary) == (7, 24, 896, 4864, 151936)


def test_a_token_uses_some_experts_of_a_layer(tmp_path: Path) -> None:
    # 8 experts of 3 x 4096 x 14336, 2 of them for each token; a router; attention as in Mistral 7B. 46.7 and 12.9
    # billion are what the model's authors say, embeddings included.
    config = {**MISTRAL_7B, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = read_shape(write_config(tmp_path, config))
    assert shape.parameters == 46_702_792_704
    expert = 32 * 3 * 4096 * 14336
    assert shape.matrices - shape.active == 6 * expert
    assert shape.parameters - 6 * expert == pytest.approx(12.9e9, rel=0.002)


def test_trained_parameters_are_those_of_the_pattern(tmp_path: Path) -> None:
    folder = write_config(tmp_path, QWEN_HALF_B)
    assert read_shape(folder, "*mlp*").trained == 24 * 3 * 896 * 4864
    with pytest.raises(EstuneError, match=r"'nothing\.\*'; names look like model\.embed_tokens\.weight"):
        read_shape(folder, "nothing.*")


def test_a_model_without_attention_caches_no_keys(tmp_path: Path) -> None:
    folder = write_config(tmp_path, build_config("mamba").to_dict())
    assert read_shape(folder).cached == 0


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
        assert rows == replica.engine._fitting_rows(slots)


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


def test_replicas_on_a_gpu_share_its_memory(tmp_path: Path) -> None:
    # 1 GB of live and 2 GB of base weights fit into 24 GB once, and into an eighth of it not.
    model = write_config(tmp_path, QWEN_HALF_B)
    one, eight = (estimate_run(None, [f"model={model}", f"replicas={n}"], gpu="rtx4090") for n in (1, 8))
    assert (one.work.at_once, one.work.base) == (1, "device")
    assert (eight.work.at_once, eight.work.base) == (8, "host")
    assert eight.choices[0].needed == 8 * total(eight.memory)


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


def test_a_70b_model_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path / "model", LLAMA_70B)
    settings = [f"model={model}", "engine=vllm", "workers=2", "gpus_per_worker=4", "weights=copy", "batch_size=64"]
    found = estimate_run(None, settings, gpu="h100")
    held = amounts(found.memory)
    # 70.55 billion parameters of 2 B over 4 GPUs, twice; 200 prompts as 4 x 50 rows of 1,536 tokens of 327,680 B.
    assert held["live weights"] == held["base (weights=copy)"] + 70_553_706_496 / 2 == 70_553_706_496 / 2
    assert found.work.base == "host"  # beside 35 GB of live weights, half of what is left is for batches
    assert held["key and value cache"] == 50 * 1536 * 327_680 / 4
    assert (found.work.devices, found.choices[0].devices, found.choices[0].host) == (8, 8, 2 * 70_553_706_496 * 2)
    assert "on each of 8 GPUs" in found.advice
    assert total(found.time) < 3600
    on_device = estimate_run(None, [*settings, "base_device=device"], gpu="h100")
    assert amounts(on_device.memory)["base (weights=copy)"] == 70_553_706_496 / 2
    # 70.6 of weights, 6 of keys and values, 1 of the process, and prompts' activations
    assert 77e9 < total(on_device.memory) < 80e9
    assert on_device.choices[0].fits
    alone = estimate_run(None, [f"model={model}", "weights=copy"], gpu="h100")
    assert alone.advice.endswith("what does: engine=vllm gpus_per_worker=4")
    assert estune("estimate", *(f"--{text}" for text in settings), "--gpu", "h100") == 0
    out = capsys.readouterr().out
    assert "memory of a worker, on each of its 4 GPUs" in out
    assert "8 x NVIDIA H100 SXM" in out


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


def test_reinforcement_learning_keeps_sixteen_bytes_a_parameter() -> None:
    grpo, ppo = (reinforcement_learning(ROUND, make_work(), FAST, method) for method in ("GRPO", "PPO"))
    of_policy = sum(amount for name, amount in amounts(grpo).items() if name.startswith("policy's"))
    assert of_policy == 16e9
    assert amounts(grpo)["reference model"] == amounts(grpo)["rollout engine's weights"] == 2e9
    assert amounts(grpo)["activations"] == 151 * 1000 * (2 * 10 + 34)
    assert total(ppo) - total(grpo) == 16e9


def test_what_fits(tmp_path: Path) -> None:
    shape = read_shape(write_config(tmp_path, QWEN_7B))
    work = make_work(slots=256)

    def fitting(gpu: str) -> set[str]:
        found: list[Choice] = choices(shape, work, as_device(find_gpu(gpu), "bfloat16"), 16384)
        return {choice.name for choice in found if choice.fits}

    # In GB: 15.2 live, 30.5 master, 15.2 copy; 20 bytes a parameter for GRPO are 152.
    inplace = {"weights=inplace", "weights=master base_device=host", "weights=copy base_device=host"}
    assert fitting("t4") == set()
    assert fitting("rtx4090") == inplace
    assert fitting("a100-40") == inplace | {"weights=copy base_device=device"}
    assert fitting("l40s") == fitting("h200") == fitting("a100-40") | {"weights=master base_device=device"}
    assert "GRPO" in fitting("b200")


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("RTX-4090").name == "NVIDIA GeForce RTX 4090"
    assert find_gpu("a100_80").gigabytes == 80
    for gpu in GPUS:
        assert find_gpu(gpu.key) is gpu
        assert gpu.source
    for name, gigabytes, key in [
        ("NVIDIA H100 80GB HBM3", 85.5, "h100"),
        ("NVIDIA H100 PCIe", 85.5, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100-80"),
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA L4", 23.6, "l4"),
        ("NVIDIA RTX A6000", 50.9, "a6000"),
        ("NVIDIA GeForce RTX 4090", 25.4, "rtx4090"),
        ("NVIDIA A10", 23.7, "a10"),
        ("Tesla T4", 15.8, "t4"),
    ]:
        assert recognise(name, int(gigabytes * 1e9)).key == key
    for name in ("Quadro K2000", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA GH200 480GB"):
        with pytest.raises(EstuneError, match=rf"{name}, is not in the table.*--gpu"):
            recognise(name, 8 * 10**9)


def test_this_machines_gpu_has_the_memory_that_the_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150_110_011_392)
    monkeypatch.setattr("estune.place.training_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = estimate_run(None, ["device=cuda", "replicas=1"])
    assert found.device.memory == properties.total_memory
    assert found.device.name == "NVIDIA H200 SXM, 150 GB"
    assert estimate_run(None, ["replicas=1"], gpu="h200").device.memory == 141 * 10**9


def test_a_gpu_without_bfloat16_computes_at_the_rate_of_float32() -> None:
    t4 = find_gpu("t4")
    assert as_device(t4, "bfloat16").decode == as_device(t4, "float32").decode
    assert as_device(t4, "float16").decode > 5 * as_device(t4, "bfloat16").decode


def test_the_command_needs_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "model", QWEN_7B)
    assert estune("estimate", "--model", folder, "--gpu", "rtx4090", "--population", 16, "max_new_tokens=512") == 0
    out = capsys.readouterr().out
    assert "7,615,616,512 parameters; 16 members" in out
    assert "57,344 B" in out
    assert "15.23 GB" in out
    assert "30.46 GB" in out
    assert "weights=master base_device=host fits" in out
    assert [path.name for path in folder.iterdir()] == ["config.json"]

    device = ["--base_device", "device"]
    assert estune("estimate", "--model", folder, "--gpu", "rtx4090", *device) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("weights=master base_device=device does not fit: it needs")
    assert "what does: weights=inplace, or weights=master base_device=host" in last

    assert estune("estimate", "--model", folder, "--gpu", "t4") == 0
    assert "does not fit: it needs 16.4 of 16 GB; what does: engine=vllm gpus_per_worker=2" in capsys.readouterr().out
    assert estune("estimate", "--model", folder, "--gpu", "t4", "--replicas", 2) == 0
    assert "no other way to hold the weights fits either" in capsys.readouterr().out


def test_a_smaller_batch_is_offered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "model", QWEN_7B)
    # 40 GB hold 15.2 live and 15.2 of a copy, and not 200 rows of 1,536 tokens of 57,344 B, which are 17.6 GB.
    options = ["--model", folder, "--gpu", "a100-40", "--weights=copy", "--base_device=device", "--batch_size", 200]
    assert estune("estimate", *options) == 0
    (batch,) = [int(word[11:]) for word in capsys.readouterr().out.split() if word.startswith("batch_size=")]
    for size, fits in [(batch, True), (batch + 1, False)]:
        assert estune("estimate", *options, "--prompts_per_step", size, "--task.eval_size", size) == 0
        assert ("does not fit" not in capsys.readouterr().out) == fits


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("estimate", "--json", "--new-tokens", 20, "--device", "cpu", "--replicas", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["parameters"] == 867_200
    assert found["work"]["at_once"] == 2
    assert found["work"]["new_tokens"] == 20
    assert [item["name"] for item in found["time"]] == ["perturb", "read the prompts", "generate", "update"]
    assert all(np.isfinite(item["amount"]) and item["amount"] > 0 for item in found["time"])
    assert set(found["reinforcement_learning"]) == {"GRPO", "PPO"}
    assert found["advice"].startswith("weights=master fits")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path / "model", QWEN_HALF_B)
    (tmp_path / "empty").mkdir()
    broken = write_config(tmp_path / "broken", {**QWEN_HALF_B, "num_attention_heads": 13})
    garbled = write_config(tmp_path / "garbled", {})
    (garbled / "config.json").write_text("{not json")
    encoder = write_config(tmp_path / "t5", {"model_type": "t5"})
    for options, message in [
        (["--gpu", "h10"], "'h10' is not in the table; did you mean h100? known are b200, h200"),
        (["--model", tmp_path / "empty"], "a directory without config.json"),
        (["--model", tmp_path / "none"], "no such directory"),
        (["--model", "nobody/has-this"], "no such directory, nor is its config.json to be had from the hub"),
        (["--model", broken], "no causal language model can be laid out"),
        (["--model", garbled], "its config.json cannot be used"),
        (["--model", encoder], "no causal language model can be laid out"),
        (["--population", -3], "population"),
        (["--batch_size", 0], "batch_size"),
        (["--prompt-tokens", -5], "--prompt-tokens must be 1 or more, found -5"),
        (["--new-tokens", 0], "--new-tokens must be 1 or more, found 0"),
        (["--new-tokens", "inf"], "--new-tokens must be 1 or more, found inf"),
        (["--new-tokens", 2000], "more than max_new_tokens 1024"),
        (["--sigmas", 1], "did you mean sigma?"),
        (["--train_parameters", "nothing.*"], "'nothing.*'"),
    ]:
        given = options if "--model" in options else ["--model", model, *options]
        assert message in refused(capsys, "estimate", *given)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, estune.cli, estune.commands, estune.estimate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""What fits, what RL would need, and the command that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from estune.study.estimate.estimate import Choice, choices, reinforcement_learning
from estune.study.estimate.machines import as_device, find_gpu
from estune.study.estimate.needs import total
from estune.study.estimate.run import estimate_run
from estune.study.estimate.shapes import read_shape
from tests.command_line import estune, refused
from tests.sizes import FAST, LLAMA_70B, QWEN_7B, QWEN_HALF_B, ROUND, amounts, make_work, write_config


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

    # In GB: 15.2 live, 30.5 master, 15.2 copy, 17.1 split_master; 20 bytes a parameter for GRPO are 152.
    inplace = {
        "weights=exact_inplace",
        "weights=inplace",
        "weights=master base_device=host",
        "weights=copy base_device=host",
    }
    assert fitting("t4") == set()
    assert fitting("rtx4090") == inplace
    assert fitting("a100-40") == inplace | {"weights=copy base_device=device", "weights=split_master"}
    assert fitting("l40s") == fitting("h200") == fitting("a100-40") | {"weights=master base_device=device"}
    assert "GRPO" in fitting("b200")


def test_replicas_on_a_gpu_share_its_memory(tmp_path: Path) -> None:
    # 1 GB of live and 2 GB of base weights fit into 24 GB once, and into an eighth of it not.
    model = write_config(tmp_path, QWEN_HALF_B)
    one, eight = (estimate_run(None, [f"model={model}", f"replicas={n}"], gpu="rtx4090") for n in (1, 8))
    assert (one.work.at_once, one.work.base) == (1, "device")
    assert (eight.work.at_once, eight.work.base) == (8, "host")
    assert eight.choices[0].needed == 8 * total(eight.memory)
    # As many as all prompts' keys and values leave room for beside each other, of 80 GB and of 24.
    auto = [f"model={model}", "workers_per_gpu=auto"]
    assert estimate_run(None, auto, gpu="h100").work.at_once == 4
    assert estimate_run(None, auto, gpu="rtx4090").work.at_once == 1
    assert estimate_run(None, [*auto, "prompts_per_step=50"], gpu="rtx4090").work.at_once == 4
    assert estimate_run(None, [*auto, "engine=vllm"], gpu="h100").work.at_once == 1


def test_prompts_and_held_out_rows_that_are_known_are_counted(tmp_path: Path) -> None:
    settings = [f"model={write_config(tmp_path, QWEN_HALF_B)}", "steps=1", "eval_steps=1"]
    few, many, none = (estimate_run(None, settings, gpu="h100", prompt_tokens=40, held_out=n) for n in (70, 7000, 0))
    assert (few.work.prompt_tokens, few.work.evaluated, many.work.evaluated) == (40, 70, 7000)
    assert none.speeds[0].days < few.speeds[0].days < many.speeds[0].days
    assert few.speeds[0].step == many.speeds[0].step


def test_moments_and_noise_that_is_drawn_again_are_counted(tmp_path: Path) -> None:
    model = write_config(tmp_path, QWEN_HALF_B)
    parts = ([], ["adam=true"], ["guided_share=0.5", "guided_window=2"], ["momentum=0.5", "momentum_window=1"])
    found = [estimate_run(None, [f"model={model}", "replicas=1", *part], gpu="h200") for part in parts]
    plain, adam, guided, _ = found
    assert amounts(adam.memory)["moments (adam)"] == 8 * adam.shape.trained
    assert [(e.work.drawn, e.work.again) for e in found] == [(1, 0), (1, 0), (61, 60), (1, 30)]
    updates = [amounts(e.time)["update"] for e in found]
    assert updates[2] == pytest.approx(3 * updates[0])
    assert updates[3] == pytest.approx(2 * updates[0])
    assert amounts(guided.time)["perturb"] > 10 * amounts(plain.time)["perturb"]


def test_the_base_counts_as_a_member_of_each_group_and_under_guard_looks_again(tmp_path: Path) -> None:
    given = [f"model={write_config(tmp_path, QWEN_HALF_B)}", "replicas=1", "population=12", "prompt_groups=3"]
    found = [estimate_run(None, [*given, *more], gpu="h200") for more in ([], ["evaluate_base=true"], ["guard=0.5"])]
    assert [(e.work.population, e.work.looks) for e in found] == [(12, 0), (15, 0), (15, 3)]
    plain, guarded = (amounts(e.time) for e in found[1:])
    looks = guarded.pop("look at the base")
    assert guarded == plain
    assert found[2].speeds[0].step - found[1].speeds[0].step == pytest.approx(looks)
    assert looks == pytest.approx(3 / 15 * (plain["read the prompts"] + plain["generate"]), rel=0.1)


def test_a_70b_model_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path / "model", LLAMA_70B)
    settings = [f"model={model}", "engine=vllm", "workers=2", "gpus_per_worker=4", "weights=copy", "batch_size=64"]
    found = estimate_run(None, settings, gpu="h100")
    held = amounts(found.memory)
    # 70.55 billion parameters of 2 B over 4 GPUs, twice; 64 rows of 1,280 tokens, which is 120 + 1,024 and one rounded
    # up, of 327,680 B.
    assert held["live weights"] == held["base (weights=copy)"] + 70_553_706_496 / 2 == 70_553_706_496 / 2
    assert found.work.base == "host"  # beside 35 GB of live weights, half of what is left is for batches
    assert held["key and value cache"] == 64 * 1280 * 327_680 / 4
    assert (found.work.devices, found.choices[0].devices, found.choices[0].host) == (8, 8, 2 * 70_553_706_496 * 2)
    assert "on each of 8 GPUs" in found.advice
    assert total(found.time) < 3600
    on_device = estimate_run(None, [*settings, "base_device=device"], gpu="h100")
    assert amounts(on_device.memory)["base (weights=copy)"] == 70_553_706_496 / 2
    # 70.6 of weights, 1 of the process and prompts' activations leave of 72 GB, nine tenths, no room for a sequence.
    assert 72e9 < total(on_device.memory) < 75e9
    assert not on_device.choices[0].fits
    assert (
        "of the 72 GB that vLLM is given of 80 GB on each of 8 GPUs; what does: weights=exact_inplace"
        in on_device.advice
    )
    alone = estimate_run(None, [f"model={model}", "weights=copy"], gpu="h100")
    assert alone.advice.endswith("what does: engine=vllm gpus_per_worker=4")
    assert estune("estimate", *(f"--{text}" for text in settings), "--gpu", "h100") == 0
    out = capsys.readouterr().out
    assert "memory of a worker, on each of its 4 GPUs" in out
    assert "8 x NVIDIA H100 SXM" in out
    scales = {scale.workers: scale for scale in found.scales}
    assert {1, 16, 1024} <= set(scales)
    assert scales[16].devices == 64
    assert scales[16].device_hours == 64 * 24 * scales[16].days
    assert scales[2].step == pytest.approx(total(found.time)) == pytest.approx(found.speeds[0].step)


def test_servers_are_machines_of_their_own(tmp_path: Path) -> None:
    model = write_config(tmp_path, QWEN_HALF_B)
    servers = [f"model={model}", "workers_at=http://a:1,http://b:1"]
    far = estimate_run(None, servers, gpu="h100")
    near = estimate_run(None, [f"model={model}", "workers=2", "engine=vllm"], gpu="h100")
    assert (far.work.devices, far.work.at_once, total(far.time)) == (2, 1, total(near.time))
    assert [speed.engine for speed in far.speeds] == ["vllm"]
    # On CPUs as well: neither has the other's memory to pay.
    assert estimate_run(None, servers).work.at_once == 1


def test_vllm_takes_what_is_left_of_its_part(tmp_path: Path) -> None:
    model = write_config(tmp_path, QWEN_7B)
    settings = [f"model={model}", "engine=vllm", "weights=copy", "base_device=device"]
    found = estimate_run(None, settings, gpu="h100")
    # 256 sequences of 1,280 tokens of 57,344 B have room beside 15.2 GB, twice.
    assert amounts(found.memory)["key and value cache"] == 256 * 1280 * 57_344
    assert total(found.memory) < 0.9 * 80e9
    # Of 40 GB they have not: all is taken that there is.
    small = estimate_run(None, settings, gpu="a100-40")
    assert total(small.memory) == pytest.approx(0.9 * 40e9)
    assert small.choices[0].fits
    # As it is set, the base comes on top of vLLM's part.
    half = estimate_run(None, [*settings, "vllm_gpu_memory_utilization=0.5"], gpu="a100-40")
    assert total(half.memory) == pytest.approx(0.5 * 40e9 + 7_615_616_512 * 2)
    many = estimate_run(None, [*settings, "prompts_per_step=2000", "vllm_max_model_length=4096"], gpu="h200")
    assert many.speeds[0].rows == 1024
    assert "1024 rows x 4,096 tokens" in next(item.how for item in many.memory if item.name == "key and value cache")


def test_this_machines_gpu_has_the_memory_that_the_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150_110_011_392)
    monkeypatch.setattr("estune.weights.device.training_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = estimate_run(None, ["device=cuda", "replicas=1"])
    assert found.device.memory == properties.total_memory
    assert found.device.name == "NVIDIA H200 SXM, 150 GB"
    assert estimate_run(None, ["replicas=1"], gpu="h200").device.memory == 141 * 10**9


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
    assert "what does: weights=exact_inplace, or weights=inplace, or weights=master base_device=host" in last

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


def test_both_engines_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "model", QWEN_HALF_B)
    (tmp_path / "lengths.json").write_text("[100, 100, 200, 3000]")
    options = ["--model", folder, "--gpu", "h100"]
    found = estimate_run(None, [f"model={folder}"], gpu="h100", lengths=tmp_path / "lengths.json")
    assert found.work.new_tokens == (100 + 100 + 200 + 1024) / 4
    assert [speed.engine for speed in found.speeds] == ["transformers", "vllm"]
    ours, vllm = found.speeds
    assert (ours.rows, vllm.rows) == (200, 256)
    assert ours.limit == "launching kernels"  # which fewer of would make faster
    assert vllm.step < ours.step
    # 30 x 200, also as half, twice and four times as many members: each reads all weights for every token.
    assert [(split.population, split.prompts) for split in found.splits] == [(15, 400), (30, 200), (60, 100), (120, 50)]
    assert found.splits[1].step == ours.step
    assert [split.step for split in found.splits] == sorted({split.step for split in found.splits})
    turned = estimate_run(None, [f"model={folder}", "engine=vllm"], gpu="h100", lengths=tmp_path / "lengths.json")
    assert turned.speeds == [vllm, ours]
    eager = estimate_run(None, [f"model={folder}", "cuda_graphs=false"], gpu="h100", new_tokens=356)
    assert eager.speeds[0].token > 2 * ours.token
    assert estune("estimate", *options, "--lengths", tmp_path / "lengths.json") == 0
    out = capsys.readouterr().out
    assert "by engine" in out
    assert "GPU-hours" in out
    assert "\n     32    32" in out
    assert "\n     64    64" not in out  # there are 30 members
    both = refused(capsys, "estimate", *options, "--lengths", tmp_path / "lengths.json", "--new-tokens", 3)
    assert "--lengths and --new-tokens both say" in both
    assert "--lengths" in refused(capsys, "estimate", *options, "--lengths", tmp_path / "none")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("estimate", "--json", "--new-tokens", 20, "--device", "cpu", "--replicas", 2) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["parameters"] == 867_200
    assert found["work"]["at_once"] == 2
    assert found["work"]["new_tokens"] == 20
    names = ["perturb", "read the prompts", "generate", "wait for the last", "update"]
    assert [item["name"] for item in found["time"]] == names
    assert all(np.isfinite(item["amount"]) and item["amount"] >= 0 for item in found["time"])
    engines = [speed["engine"] for speed in found["speeds"]]
    assert engines == ["transformers", "transformers, noise=rank1"]  # vLLM's rates here are not known
    assert found["scales"] == []
    assert set(found["reinforcement_learning"]) == {"GRPO", "PPO"}
    assert found["advice"].startswith("weights=master fits")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_config(tmp_path / "model", {**QWEN_HALF_B, "num_hidden_layers": 2})
    (tmp_path / "empty").mkdir()
    broken = write_config(tmp_path / "broken", {**QWEN_HALF_B, "num_hidden_layers": 2, "num_attention_heads": 13})
    garbled = write_config(tmp_path / "garbled", {})
    (garbled / "config.json").write_text("{not json")
    encoder = write_config(tmp_path / "t5", {"model_type": "t5"})
    for options, message in [
        (["--gpu", "h10"], "'h10' is not in the table; did you mean h100? known are b200, h200"),
        (["--population", 10**9], "a step of these settings has 200,000,000,000 completions"),
        (["--task.eval_size", 10**9], "an evaluation of these settings has 1,000,000,000 completions"),
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
        (["--gpu", "h100", "--gpus_per_worker", 4], "14 heads of queries and 2 of keys and values; take"),
        (["--gpu", "h100", "--gpus_per_worker", 7], "14 heads of queries and 2 of keys and values; take"),
        (["--new-tokens", 2000], "more than max_new_tokens 1024"),
        (["--sigmas", 1], "did you mean sigma?"),
        (["--train_parameters", "nothing.*"], "'nothing.*'"),
    ]:
        given = options if "--model" in options else ["--model", model, *options]
        assert message in refused(capsys, "estimate", *given)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, estune.cli, estune.study.estimate.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Runs that train integer weights: what is documented, by NumPy and plain transformers; killed, resumed, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.config import Config
from estune.engines.cpu.fused import FusedDecoder
from estune.engines.decode import Decoder
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.pool.replica import Replica
from estune.study.estimate.needs import memory
from estune.study.estimate.shapes import read_shape
from estune.weights.checkpoint import Checkpoint
from tests.grids import Latent
from tests.kills import differences, killed_at
from tests.models import save_model
from tests.runs import assert_same_run, make_config, make_task, substance, trained, variety_by_generate
from tests.sizes import FAST, amounts, make_work

GROUP = 16


def config(output: Path, model: Path, **changes: Any) -> Config:
    return make_config(output, model, **{"weights": "int4", "weights_group_size": GROUP, "carry_steps": 3, **changes})


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_run_is_what_is_documented(weights: str, model: Path, tmp_path: Path) -> None:
    """Every step again: `generate` per prompt with a member's weights, and the update, in NumPy."""
    place = trained(
        config(tmp_path / "run", model, weights=weights, learning_rate=0.05, prompts_per_step=3, carry_steps=2, steps=3)
    )
    base = Checkpoint(model)
    journal = Journal.read(place)
    net = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = make_task()
    bits = int(weights[3:])
    matrices = [name for name, tensor in base.tensors.items() if len(tensor.shape) == 2]
    assert sorted(journal.header.tensors) == sorted(matrices)
    latents = {n: Latent(base.tensors[n].read(), n, GROUP, bits, 2, stochastic=True) for n in matrices}

    def reward_with(values: dict[str, Any], rows: list[int]) -> float:
        shaped = {n: torch.from_numpy(v).view(base.tensors[n].shape) for n, v in values.items()}
        net.load_state_dict(shaped, strict=False)
        return variety_by_generate(net, tokenizer, [task.train[i]["prompt"] for i in rows])

    for record in journal.steps:
        members = record.update.members
        rewards = [
            reward_with({n: each.member(m.seed, m.sign, 0.02) for n, each in latents.items()}, record.prompts)
            for m in members
        ]
        assert rewards == pytest.approx(record.rewards)
        assert np.std(rewards) > 0
        z = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        pairs = [(m.seed, float(np.float32(0.05 / 4 * z_i))) for m, z_i in zip(members, z, strict=True)]
        assert [c for _, c in pairs] == pytest.approx(record.update.coefficients)
        for each in latents.values():
            each.apply(record.update.pairs, 0.02, record.update.rounding_seed)
    final = load_file(place / "final" / "model.safetensors")
    for name, each in latents.items():
        np.testing.assert_array_equal(final[name].numpy().ravel(), each.values())
    AutoModelForCausalLM.from_pretrained(place / "final")


def test_replicas_replay_and_verification(model: Path, tmp_path: Path) -> None:
    one = trained(config(tmp_path / "1", model, replicas=1, save_steps=2, carry="keep"))
    two = trained(config(tmp_path / "2", model, replicas=2, save_steps=2))
    assert_same_run(one, two)
    assert replay(two, tmp_path / "all") == Journal.read(two).fingerprint()
    final = (two / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == final
    proof = verify(two)
    assert (proof.steps, proof.fingerprints) == (4, 5)
    assert "checkpoint-2" in proof.checkpoints
    further = trained(config(tmp_path / "3", model, steps=2, start_from=one))
    assert verify(further).steps == 6


@pytest.mark.parametrize("carry_steps", [2, 3])
def test_killed_and_resumed(carry_steps: int, model: Path, tmp_path: Path) -> None:
    """Where checkpoint-2 is the end of a window it is gone on from, else the base model."""
    options: Any = {"steps": 4, "save_steps": 2, "carry_steps": carry_steps}
    events = killed_at(None, config(tmp_path / "whole" / "run", model, **options))
    assert events is not None
    last = [i for i, each in enumerate(events) if each == "fsync journal.jsonl"][-3]
    killed = config(tmp_path / "run", model, **options)
    assert killed_at(last, killed) is None
    killed_at(None, killed)
    assert not differences(tmp_path / "run", tmp_path / "whole" / "run")


def test_a_model_that_is_decoded_over_its_own_forward(tmp_path: Path) -> None:
    model = save_model(tmp_path / "base", "gemma", seed=1)
    options: Any = {"train_parameters": "*_proj.weight,lm_head.weight", "steps": 2}
    place = trained(config(tmp_path / "run", model, **options))
    engine = Replica(config(tmp_path / "other", model, **options)).engine
    assert isinstance(engine.decoder, Decoder)  # type: ignore[attr-defined]
    assert verify(place).steps == 2
    assert "lm_head.weight" in Journal.read(place).header.tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_live_weights_are_integers_and_as_large_as_estimated(weights: Any, dtype: str) -> None:
    replica = Replica(Config(device="cpu", weights=weights, dtype=dtype, replicas=1, threads=1))
    model: Any = replica.engine.model  # type: ignore[attr-defined]
    buffers = [tensor for name, tensor in model.named_buffers() if "rotary" not in name]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *buffers)}
    estimated = amounts(memory(read_shape("tiny"), make_work(policy=weights, dtype=dtype), FAST, 1024))
    assert estimated["live weights"] == sum(held.values())
    assert isinstance(replica.engine.decoder, FusedDecoder)  # type: ignore[attr-defined]
    assert replica.engine.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "vllm"}, "trained by engine=transformers"),
        ({"device": "cuda"}, "set device=cpu"),
        ({"noise": "rank1"}, "noise=iid"),
        ({"momentum": 0.5}, "leave out momentum"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"adapter": {"rank": 2}}, "leave out adapter"),
        ({"adam": True}, "weights must be master"),
        ({"anchor_decay": 0.1}, "set weights=master"),
        ({"guided_share": 0.5}, "weights must be master or copy"),
        ({"max_staleness": 1}, "max_staleness must be 0"),
        ({"base_device": "host"}, "keeps no base that base_device=host could hold"),
        ({"weights_group_size": 48}, "16, 32, 64, 128 or 256"),
        ({"weights": "master", "weights_group_size": 32}, "set weights=int8"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    from estune.config import parse

    with pytest.raises(EstuneError, match=told):
        parse({"weights": "int4", **changes})


def test_matrices_that_cannot_be_integers_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(EstuneError, match=r"c_attn.weight is no weight of a linear layer"):
        Replica(config(tmp_path / "run", model))
    wide = save_model(tmp_path / "base")
    with pytest.raises(EstuneError, match="weights_group_size 64 does not divide the 48 columns"):
        Replica(config(tmp_path / "run", wide, weights_group_size=64))


def test_a_run_goes_on_only_from_one_of_the_same_grid(model: Path, tmp_path: Path) -> None:
    one = trained(config(tmp_path / "1", model, steps=1))
    with pytest.raises(EstuneError, match="grid of integers"):
        trained(config(tmp_path / "2", model, steps=1, carry_steps=2, start_from=one))


def test_a_step_that_is_taken_back_is_part_of_what_is_carried_on(model: Path, tmp_path: Path) -> None:
    place = trained(config(tmp_path / "run", model, guard=0.0, steps=4, learning_rate=0.5))
    assert any(r.metrics.get("taken_back") for r in Journal.read(place).steps)
    assert verify(place).steps == 4
    assert [substance(r)[3] for r in Journal.read(place).steps][-1] == Journal.read(place).fingerprint()

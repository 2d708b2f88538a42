"""Runs with members of low-rank noise in vLLM's slots: replayed, resumed, and those of the transformers engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, CohereConfig, PretrainedConfig, StableLmConfig

from estune.completion import Sampling
from estune.engines.vllm.low_rank import LowRankWeights
from estune.engines.vllm.open import open_vllm
from estune.es.strategy import Member
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.local import LocalPool
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from tests.models import build_tokenizer
from tests.runs import assert_same_run, cut, make_config, make_task, substance
from tests.vllm.conftest import SHAPE
from tests.vllm.pairs import PROMPTS

pytestmark = pytest.mark.usefixtures("alone_here")


def trainer(output: Path, model: Path, **changes: Any) -> Trainer:
    given = {"engine": "vllm", "replicas": None, "batch_size": 32, "steps": 2, "device": "cpu", "threads": 1}
    noise = {"noise": "rank1", "sigma": 0.1, "learning_rate": 0.05}
    search = {"evaluate_base": True, "mirrored": True}  # the base is one more member
    return Trainer(make_config(output, model, **{**noise, **search, **given, **changes}), task=make_task(), monitors=[])


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


@pytest.fixture(scope="module")
def run(tiny: Path, alone_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in slots") / "run"
    training = trainer(folder, tiny)
    assert isinstance(training.pool, LocalPool)
    assert training.pool.own.at_once(PROMPTS, Sampling(8)) == 5  # the population and the base
    training.train()
    return folder


def test_replay_gives_the_trained_weights(run: Path, tmp_path: Path) -> None:
    journal = Journal.read(run)
    assert all(len(set(record.rewards)) > 1 for record in journal.steps)
    assert replay(run, tmp_path / "replayed") == journal.fingerprint()


def test_it_is_the_run_of_the_transformers_engine(run: Path, tiny: Path, tmp_path: Path) -> None:
    """In float32, where no two tokens of these completions are all but equally likely."""
    trainer(tmp_path / "run", tiny, engine="transformers", batch_size=None).train()
    ours, theirs = Journal.read(run), Journal.read(tmp_path / "run")
    assert [substance(record) for record in ours.steps] == [substance(record) for record in theirs.steps]
    assert ours.header.base_hash == theirs.header.base_hash


def test_resumed_it_is_the_undisturbed_run(run: Path, tmp_path: Path) -> None:
    cut(run, tmp_path / "run", 1)
    assert Trainer.resume(tmp_path / "run", task=make_task(), monitors=[]).train().steps == 2
    assert_same_run(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (StableLmConfig, "vLLM cannot run model .* does not support LoRA"),
        (CohereConfig, "vLLM has no slots for model.layers.0.input_layernorm.weight"),  # of a norm of its own
    ],
)
def test_where_vllm_turns_out_to_have_no_slots_members_are_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[PretrainedConfig], why: str
) -> None:
    path = tmp_path / "model"
    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 256}
    del shape["head_dim"]
    AutoModelForCausalLM.from_config(kind(**shape)).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    config = make_config(tmp_path, path, noise="rank1", engine="vllm", device="cpu")
    engine, weights = open_vllm(Checkpoint(path), config)
    try:
        assert re.search(f"members of low-rank noise are decoded one by one, as {why}", caplog.text)
        assert not isinstance(weights, LowRankWeights)
        assert not engine.slots
        weights.perturb(Member(1), 0.1)
    finally:
        engine.close()

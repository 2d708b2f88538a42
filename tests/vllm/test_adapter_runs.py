"""Runs that train an adapter with engine=vllm: replayed, resumed, and those of the transformers engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Sampling
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.local import LocalPool
from estune.run.trainer import Trainer
from estune.weights.adapters import WEIGHTS
from tests.runs import cut, make_config, make_task, substance
from tests.vllm.pairs import PROMPTS

pytestmark = pytest.mark.usefixtures("alone_here", "own_cache")


def trainer(output: Path, model: Path, **changes: Any) -> Trainer:
    given = {"engine": "vllm", "replicas": None, "batch_size": 24, "steps": 2, "device": "cpu", "threads": 1}
    adapter = {"rank": 3, "target": "q_proj,down_proj", "alpha": 12}
    settings = {"sigma": 0.2, "learning_rate": 0.2, "adapter": adapter, **given, **changes}
    return Trainer(make_config(output, model, **settings), task=make_task(), monitors=[])


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = Journal.read(one), Journal.read(other)
    assert [substance(record) for record in ours.steps] == [substance(record) for record in theirs.steps]
    assert ours.header.base_hash == theirs.header.base_hash
    assert (one / "final" / WEIGHTS).read_bytes() == (other / "final" / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def tiny(saved: Callable[..., Path]) -> Path:
    return saved("qwen2")


@pytest.fixture(scope="module")
def run(tiny: Path, own_cache: None, alone_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "run"
    training = trainer(folder, tiny)
    assert isinstance(training.pool, LocalPool)
    assert training.pool.own.at_once(PROMPTS, Sampling(8)) == 4  # the population
    training.train()
    return folder


def test_replay_gives_the_trained_adapter(run: Path, tmp_path: Path) -> None:
    journal = Journal.read(run)
    assert all(max(record.rewards) > min(record.rewards) for record in journal.steps)
    assert replay(run, tmp_path / "replayed") == journal.fingerprint()
    assert (run / "final" / WEIGHTS).read_bytes() == (tmp_path / "replayed" / WEIGHTS).read_bytes()


def test_it_is_the_run_of_the_transformers_engine(run: Path, tiny: Path, tmp_path: Path) -> None:
    """In float32, where no two tokens of these completions are all but equally likely."""
    pytest.importorskip("peft")
    trainer(tmp_path / "run", tiny, engine="transformers", batch_size=None).train()
    assert_same(run, tmp_path / "run")


def test_resumed_it_is_the_undisturbed_run(run: Path, tmp_path: Path) -> None:
    cut(run, tmp_path / "run", 1)
    assert Trainer.resume(tmp_path / "run", task=make_task(), monitors=[]).train().steps == 2
    assert_same(run, tmp_path / "run")

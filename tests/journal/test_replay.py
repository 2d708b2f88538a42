"""Replay from a journal alone: what it rebuilds, and what it needs for that."""

from __future__ import annotations

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from estune.errors import EstuneError
from estune.es.update import terms
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.trainer import Trainer
from estune.weights import rebuild
from estune.weights.checkpoint import Checkpoint
from tests.journal.histories import write_history
from tests.models import save_model
from tests.runs import make_config, make_task

STEPS, MEMBERS = 5, 3
module: Any = importlib.import_module("estune.journal.replay")  # `estune.journal.replay` can also be the function


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with a journal of a few steps, as training would have written it."""
    write_history(tmp_path / "run", save_model(tmp_path / "model"), STEPS, population=MEMBERS)
    return tmp_path / "run"


def test_rebuilds_what_training_had(run: Path, tmp_path: Path) -> None:
    assert replay(run, tmp_path / "out") == Journal.read(run).steps[-1].fingerprint
    trained, found = (load_file(p / "model.safetensors") for p in (run / "final", tmp_path / "out"))
    base = load_file(tmp_path / "model" / "model.safetensors")
    assert trained.keys() == found.keys() == base.keys()
    assert all(torch.equal(trained[name], found[name]) for name in trained)
    assert not any(torch.equal(trained[name], base[name]) for name in trained)


def test_terms_are_made_once_for_all_tensors(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(rebuild, "terms", lambda u, rounding: (made.append(u.step), terms(u, rounding))[1])
    replay(run, tmp_path / "out")
    assert len(Journal.read(run).header.tensors) > STEPS
    assert made == list(range(STEPS))


def test_uses_the_cores_it_is_given(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: set[Any] = set()

    def pool(count: int) -> ThreadPoolExecutor:
        workers.add(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr(rebuild, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5}, raising=False)
    replay(run, tmp_path / "out")
    monkeypatch.delattr(os, "sched_getaffinity")
    replay(run, tmp_path / "again")
    assert workers == {2, 64}


def test_refuses_a_type_it_cannot_write(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EstuneError, match="'float12' is no type of this run's checkpoints; give one of float32, bfloat16, "
    ):
        replay(run, tmp_path / "out", dtype="float12")


def test_a_tensor_of_another_type_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(module, "base_checkpoint", lambda header, model: Checkpoint(tmp_path / "model"))
    with pytest.raises(EstuneError, match=r"tensor model\..* is stored as F64"):
        replay(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["copy", "exact_inplace", "inplace"])
def test_a_float16_run_replays(policy: str, model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, dtype="float16", save_dtype="float16", weights=policy, device="cpu")
    Trainer(config, task=make_task(), monitors=[]).train()
    header = Journal.read(tmp_path / "run").header
    assert (header.dtype, header.live_dtype) == ("float16", "float16")
    replay(tmp_path / "run", tmp_path / "out")
    trained, found = (load_file(p / "model.safetensors") for p in (tmp_path / "run" / "final", tmp_path / "out"))
    assert all(torch.equal(trained[name], found[name]) for name in trained)
    assert {t.dtype for t in found.values()} == {torch.float16}

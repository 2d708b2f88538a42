"""A run's weights in memory: the same as those of the checkpoint that replay writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import estune
from estune.errors import EstuneError
from estune.journal.replay import replay
from estune.journal.share import pack
from tests.journal.histories import forge, write_history
from tests.models import save_model


def assert_same(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_model_that_the_checkpoint_loads_as(tmp_path: Path, architecture: str, dtype: str) -> None:
    write_history(tmp_path / "run", save_model(tmp_path / "model", architecture), final=False, dtype=dtype)
    pack(tmp_path / "run", tmp_path / "run.estune")
    heard: list[float] = []
    for step in (None, 0, 2):
        replay(tmp_path / "run", tmp_path / f"{step}", step)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / f"{step}", dtype="auto", trust_remote_code=False)
        for run in ("run", "run.estune"):
            assert_same(estune.load(tmp_path / run, step, told=heard.append), expected)
    assert heard[-1] == 1.0
    loaded = estune.load(tmp_path / "run", dtype="float16")
    assert loaded.dtype == torch.float16
    assert not loaded.training


def test_what_is_not_trained_stays_as_it_is(tmp_path: Path, model: Path) -> None:
    from estune.run.trainer import Trainer
    from tests.runs import make_config, make_task

    config = make_config(tmp_path / "run", model, steps=2, train_parameters="*mlp*", dtype="bfloat16")
    Trainer(config, task=make_task(), monitors=[]).train()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype="auto", trust_remote_code=False)
    assert_same(estune.load(tmp_path / "run"), final)


def test_what_is_refused(tmp_path: Path, model: Path) -> None:
    journal = write_history(tmp_path / "run", model, final=False)
    with pytest.raises(EstuneError, match="has 3 steps, not 4"):
        estune.load(tmp_path / "run", 4)
    with pytest.raises(EstuneError, match="dtype: 'int8' is unknown"):
        estune.load(tmp_path / "run", dtype="int8")
    forge(tmp_path / "run", 2, fingerprint="0" * 16)
    with pytest.raises(EstuneError, match=f"give fingerprint {journal.fingerprint()}, the journal says 0000"):
        estune.load(tmp_path / "run")

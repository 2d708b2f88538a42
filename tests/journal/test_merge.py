"""Sums of runs: what their weights are, and which runs have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.es.earlier import Momentum
from estune.journal.journal import Journal
from estune.journal.merge import merge
from estune.journal.share import pack
from estune.journal.verify import verify
from estune.weights.checkpoint import Checkpoint
from tests.journal.histories import write_history
from tests.models import save_model


def changes(run: Path, base: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = Checkpoint(run / "final").tensors
    return {name: found[name].read().astype(float) - tensor.read() for name, tensor in Checkpoint(base).tensors.items()}


@pytest.mark.parametrize("weights", [None, [1.0, 0.5], [-1.0, 0.0]])
def test_the_sum_of_two_runs_is_the_sum_of_their_changes(
    model: Path, tmp_path: Path, weights: list[float] | None
) -> None:
    write_history(tmp_path / "a", model, seed=1, momentum=Momentum(0.5, 2))
    write_history(tmp_path / "b", model, seed=2, steps=2, evaluate_base=True)
    pack(tmp_path / "b", tmp_path / "b.estune")
    heard: list[float] = []
    assert (
        merge([tmp_path / "a", tmp_path / "b.estune"], tmp_path / "ab", weights, told=heard.append) == tmp_path / "ab"
    )
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    one, other = changes(tmp_path / "a", model), changes(tmp_path / "b", model)
    factors = weights or [1.0, 1.0]
    for name, both in changes(tmp_path / "ab", model).items():
        np.testing.assert_allclose(both, factors[0] * one[name] + factors[1] * other[name], atol=2e-6)
    proof = verify(tmp_path / "ab")
    assert (proof.steps, proof.checkpoints, proof.missing) == (5, {"final": 5}, None)
    merged = Journal.read(tmp_path / "ab")
    assert [entry["weight"] for entry in merged.settings["merged"]] == factors
    assert merged.header.task == "variety"


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"policy": "copy"}, "weights are kept by master, of .*/b copy"),
        ({"rounding": "stochastic"}, "rounding is nearest, of .*/b stochastic"),
        ({"weight_decay": 0.1}, "/b has weight decay, an anchor or moments, from step 1 on"),
    ],
    ids=str,
)
def test_runs_that_have_no_sum_are_refused(model: Path, tmp_path: Path, other: dict[str, Any], why: str) -> None:
    write_history(tmp_path / "a", model, final=False)
    write_history(tmp_path / "b", model, final=False, **other)
    with pytest.raises(EstuneError, match=why):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert not (tmp_path / "ab").exists()


def test_what_else_cannot_be_merged(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "a", model, final=False)
    write_history(tmp_path / "b", save_model(tmp_path / "other", seed=5), final=False)
    write_history(tmp_path / "c", model, final=False, policy="inplace", dtype="bfloat16")
    with pytest.raises(EstuneError, match="base model is "):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    with pytest.raises(EstuneError, match="run with weights=inplace"):
        merge([tmp_path / "c", tmp_path / "c"], tmp_path / "ab")
    with pytest.raises(EstuneError, match="2 runs and 1 weights"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "ab", [1.0])
    with pytest.raises(EstuneError, match="exists already"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "b")

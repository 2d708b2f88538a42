"""What `diff` and `log` tell of runs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.journal.diff import diff
from estune.journal.log import log
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import layer_of
from tests.journal.histories import forge, write_history
from tests.models import save_model


def norm(one: Path, other: Path, layer: str | None = None) -> float:
    """Of the difference of two checkpoints, in all or of a layer, computed from whole tensors."""
    a, b = Checkpoint(one).tensors, Checkpoint(other).tensors
    names = [name for name in a if layer in (None, layer_of(name)[0])]
    return math.sqrt(sum(np.sum(np.square(a[n].read().astype(float) - b[n].read())) for n in names))


def size(model: Path, layer: str | None = None) -> float:
    tensors = Checkpoint(model).tensors
    names = [name for name in tensors if layer in (None, layer_of(name)[0])]
    return math.sqrt(sum(np.sum(np.square(tensors[name].read().astype(float))) for name in names))


def test_distances_are_those_of_the_checkpoints(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "a", model, seed=1)
    write_history(tmp_path / "b", model, seed=2, steps=4)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.settings == {"seed": (1, 2), "steps": (3, 4)}
    assert found.steps == (3, 4)
    assert found.first == 1
    assert "members" in found.fields
    rows = {row.layer: row for row in found.layers}
    assert [*rows] == ["0", "1", "2", "embed_tokens", "norm", "all"]
    for layer in ("1", None):
        row = rows[layer or "all"]
        one, other, base = tmp_path / "a" / "final", tmp_path / "b" / "final", model
        assert row.between == pytest.approx(norm(one, other, layer) / size(base, layer))
        assert row.moved[0] == pytest.approx(norm(one, base, layer) / size(base, layer))
        assert row.moved[1] == pytest.approx(norm(other, base, layer) / size(base, layer))
    assert abs(rows["all"].cosine) < 0.05  # other seeds, other directions


def test_a_run_and_its_copy_do_not_differ(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "a", model, final=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert (found.settings, found.begun_with, found.first, found.why) == ({}, {}, None, "")
    assert found.layers[-1].between == 0
    assert found.layers[-1].cosine == pytest.approx(1)


def test_the_first_step_that_is_another_is_named(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "a", model, final=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    forge(tmp_path / "b", 1, prompts=[5, 6])
    found = diff(tmp_path / "a", tmp_path / "b", weights=False)
    assert (found.first, found.fields) == (2, ("prompts",))
    assert (found.layers, found.why) == ([], "not asked for")


def test_weights_that_have_no_distance_leave_the_rest_told(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "a", model, final=False)
    write_history(tmp_path / "b", save_model(tmp_path / "model", "llama"), final=False)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert "base_hash" in found.begun_with
    assert "other tensors, or tensors of other shapes" in found.why


def test_a_log_has_all_in_order(model: Path, tmp_path: Path) -> None:
    journal = write_history(tmp_path / "a", model, final=False)
    rows = log(tmp_path / "a")
    assert [(row["kind"], row["step"]) for row in rows] == [("evaluation", 0), ("step", 1), ("step", 2), ("step", 3)]
    assert rows[0]["eval_accuracy"] == 0.25
    last = rows[-1]
    assert last["reward"] == pytest.approx(0.35)
    assert (last["members"], last["failed_members"], last["sigma"]) == (4, 0, 0.01)
    assert last["reward_max"] == pytest.approx(0.5)
    assert last["reward_std"] == pytest.approx(0.1118, abs=1e-4)
    assert last["fingerprint"] == journal.steps[-1].fingerprint
    assert last["time/update"] == journal.steps[-1].metrics["time/update"]
    forge(tmp_path / "a", 0, rewards=[None, None, None, math.nan and None])
    assert log(tmp_path / "a")[0]["reward"] is None
    with pytest.raises(EstuneError, match="this is no run"):
        log(tmp_path)

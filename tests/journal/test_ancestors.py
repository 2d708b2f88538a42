"""Runs that go on from other runs: base + journal A + journal B is all that their weights are."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.noise import reference
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from tests.runs import assert_same_run, make_config, make_task


def run(folder: Path, model: Path, **changes: object) -> Journal:
    Trainer(make_config(folder, model, **changes), task=make_task(), monitors=[]).train()
    return Journal.read(folder)


def test_a_run_goes_on_from_one_whose_weights_were_kept_in_another_way_with_the_same_bits(
    model: Path, tmp_path: Path
) -> None:
    first = run(tmp_path / "a", model, steps=1, weights="split_master", dtype="bfloat16")
    options: dict[str, object] = {"dtype": "bfloat16", "steps": 1, "start_from": tmp_path / "a"}
    second = run(tmp_path / "b", model, weights="master", **options)
    assert second.header.fingerprint == first.fingerprint()
    third = run(tmp_path / "c", model, **{**options, "weights": "split_master", "start_from": tmp_path / "b"})
    assert third.header.fingerprint == second.fingerprint()
    with pytest.raises(EstuneError, match="was run with weights=split_master, found copy: set weights=split_master"):
        run(tmp_path / "d", model, weights="copy", **options)


@pytest.mark.parametrize("weights", ["master", "exact_inplace", "inplace"])
def test_a_chain_replays_and_resumes_without_its_ancestors_folders(model: Path, tmp_path: Path, weights: str) -> None:
    changes = {"weights": weights, "dtype": "bfloat16"}
    first = run(tmp_path / "a", model, steps=2, **changes)
    second = run(tmp_path / "b", model, steps=1, start_from=tmp_path / "a", **changes)
    third = run(tmp_path / "c", model, steps=4, start_from=tmp_path / "b", **changes)
    assert second.header.fingerprint == first.fingerprint()
    assert third.header.ancestors == [first.check, second.check]
    assert [r.fingerprint for r in third.inherited] == [r.fingerprint for r in (*first.steps, *second.steps)]
    seeds = [m.seed for r in third.history for m in r.update.members]
    assert len(set(seeds)) == len(seeds)  # the same seed setting, and other perturbations

    shorter = make_config(tmp_path / "d", model, steps=2, start_from=tmp_path / "b", save_steps=1, **changes)
    Trainer(shorter, task=make_task(), monitors=[]).train()
    for folder in ("a", "b"):
        shutil.rmtree(tmp_path / folder)
    replay(tmp_path / "c", tmp_path / "replayed")
    trained, replayed = (tmp_path / name / "model.safetensors" for name in ("c/final", "replayed"))
    assert trained.read_bytes() == replayed.read_bytes()
    Trainer.resume(tmp_path / "d", steps=4, task=make_task(), monitors=[]).train()
    assert_same_run(tmp_path / "c", tmp_path / "d")


def test_the_weights_are_the_sum_of_both_journals(model: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", model, steps=2)
    found = run(tmp_path / "b", model, steps=2, start_from=tmp_path / "a", train_parameters="*")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = Checkpoint(model).tensors[name].read()
    for record in found.history:
        total = np.zeros_like(expected)
        for member, coefficient in zip(record.update.members, record.update.coefficients, strict=True):
            total += np.float32(coefficient) * reference.normal_by_id(
                member.seed, reference.tensor_id(name), 0, len(expected)
            )
        expected += total
    assert len(found.history) == 4
    np.testing.assert_array_equal(Checkpoint(tmp_path / "b" / "final").tensors[name].read(), expected)


def test_what_does_not_go_on_is_refused(model: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", model, steps=2)
    with pytest.raises(EstuneError, match="was run with weights=master, found copy: set weights=master"):
        run(tmp_path / "b", model, start_from=tmp_path / "a", weights="copy")
    with pytest.raises(EstuneError, match="live weights are float32, here bfloat16"):
        run(tmp_path / "b", model, start_from=tmp_path / "a", dtype="bfloat16")
    with pytest.raises(EstuneError, match="content hash"):
        run(tmp_path / "b", Path("tiny"), start_from=tmp_path / "a")
    with pytest.raises(EstuneError, match="this is no run"):
        run(tmp_path / "b", model, start_from=tmp_path)
    assert not (tmp_path / "b").exists()


def test_an_ancestor_that_is_gone_or_another_is_refused(model: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", model, steps=2)
    run(tmp_path / "b", model, steps=1, start_from=tmp_path / "a")
    other = run(tmp_path / "other", model, steps=2, seed=1)
    (tmp_path / "b" / "ancestor-1.jsonl").write_bytes(other.path.read_bytes())
    with pytest.raises(EstuneError, match=r"ancestor-1.jsonl is not the journal that .* goes on from"):
        replay(tmp_path / "b", tmp_path / "x")
    (tmp_path / "b" / "ancestor-1.jsonl").unlink()
    with pytest.raises(EstuneError, match=r"ancestor-1.jsonl is missing"):
        Trainer.resume(tmp_path / "b", steps=2, task=make_task())

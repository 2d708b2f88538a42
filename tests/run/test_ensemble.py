"""Members that answer together: chosen by reward, by vote, and merged, against weights and counts made here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from estune import Ensemble, ensemble
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.noise import reference
from estune.run.ensemble import vote
from estune.run.evaluate import evaluate_model
from estune.run.trainer import Trainer
from estune.tasks.base import Task
from tests.runs import make_config, make_task

SETTINGS = ["prompts_per_step=6", "max_new_tokens=8", "replicas=1", "report_to=none", "sigma=0.05"]


def task() -> Task:
    return make_task(evaluation=8, answer=lambda text: text[:1] or None)


def moved(model: Path, folder: Path, members: list[tuple[int, float]]) -> Path:
    """A copy of a checkpoint with noise added, made in NumPy."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        key = reference.tensor_id(name)
        for seed, coefficient in members:
            noise = reference.normal_by_id(seed, key, 0, tensor.size).reshape(tensor.shape)
            tensor += np.float32(coefficient) * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ensemble, Path]:
    merged = tmp_path_factory.mktemp("merged") / "model"
    return ensemble(str(model), None, SETTINGS, members=6, top=3, task=task(), save=merged), merged


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n,
       max_size=n), min_size=1, max_size=6)))  # fmt: skip
def test_the_vote_takes_the_commonest_answer_and_of_equals_the_earliest_members(
    answers: list[list[str | None]],
) -> None:
    table = np.array(answers, object)
    for taken, of_prompt in zip(vote(answers), table.T, strict=True):
        counts = [0 if mine is None else int(np.sum(of_prompt == mine)) for mine in of_prompt]
        assert taken == int(np.argmax(counts))


def test_members_are_those_of_the_highest_rewards_and_figures_those_of_their_checkpoints(
    model: Path, tmp_path: Path, found: tuple[Ensemble, Path]
) -> None:
    chosen, _ = found
    assert chosen.tried == 6
    assert chosen.rewards == sorted(chosen.rewards, reverse=True)
    assert len(set(chosen.members)) == 3
    all_of_them = ensemble(str(model), None, SETTINGS, members=6, top=6, task=task())
    assert all_of_them.members[:3] == chosen.members
    best = moved(model, tmp_path / "best", [(int(chosen.members[0], 16), 0.05)])
    for place, figures in ((model, chosen.figures["base"]), (best, chosen.figures["best"])):
        assert evaluate_model(str(place), None, SETTINGS, task=task()) == figures


def test_the_merged_model_is_the_mean_of_the_members(model: Path, tmp_path: Path, found: tuple[Ensemble, Path]) -> None:
    chosen, merged = found
    mean = moved(model, tmp_path / "mean", [(int(seed, 16), 0.05 / 3) for seed in chosen.members])
    expected = load_file(mean / "model.safetensors")
    for name, tensor in load_file(merged / "model.safetensors").items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6)
    assert evaluate_model(str(merged), None, SETTINGS, task=task()) == chosen.figures["merged"]


def test_an_ensemble_from_its_file_answers_the_same(model: Path, tmp_path: Path, found: tuple[Ensemble, Path]) -> None:
    chosen, _ = found
    chosen.write(tmp_path / "ensemble.json")
    again = Ensemble.read(tmp_path / "ensemble.json")
    assert again == chosen
    assert ensemble(str(model), None, SETTINGS, given=again, task=task()) == chosen
    with pytest.raises(EstuneError, match="the ensemble's weights: 0123; here: "):
        ensemble(str(model), None, SETTINGS, given=replace(again, fingerprint="0123"), task=task())
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": []}))
    with pytest.raises(EstuneError, match="no ensemble that"):
        Ensemble.read(tmp_path / "ensemble.json")
    with pytest.raises(EstuneError, match=r"nowhere.json: No such file"):
        Ensemble.read(tmp_path / "nowhere.json")


def test_around_a_run_members_are_those_that_it_tried_or_new_ones(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_config(run, model, learning_rate=0.02, steps=3, eval_steps=1), task=task(), monitors=[]).train()
    journal = Journal.read(run)
    found = ensemble(str(run), step=1, of_step=True, top=2, task=task())
    assert (found.step, found.fingerprint) == (1, journal.steps[0].fingerprint)
    assert found.sigma == journal.steps[1].sigma
    assert set(found.members) <= {f"{m.seed:016x}" for m in journal.steps[1].update.members}
    assert found.figures["base"]["eval_reward"] == journal.evaluations[1].metrics["eval_reward"]

    fresh = ensemble(str(run), members=3, top=1, task=task())
    best = journal.best
    assert best is not None
    assert fresh.step == best.step
    assert fresh.figures["base"]["eval_accuracy"] == best.metrics["eval_accuracy"]
    assert fresh.figures["vote"] == fresh.figures["best"]
    with pytest.raises(EstuneError, match="has taken no step after 3"):
        ensemble(str(run), step=3, of_step=True, task=task())


def test_without_an_answer_there_is_no_vote(model: Path) -> None:
    found = ensemble(str(model), None, SETTINGS, members=2, top=1, task=make_task())
    assert list(found.figures) == ["base", "best", "merged"]
    assert [row[0] for row in found.rows()] == ["", "base", "best member", "1 merged"]


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"top": 9, "members": 8}, [], "--top 9 of --members 8"),
        ({"step": 1}, [], "is no run, which has steps"),
        ({}, ["weights=inplace"], "weights=inplace drifts"),
        ({"save": Path("/tmp")}, [], "exists already"),
    ],
)
def test_what_makes_no_ensemble_is_refused(
    model: Path, options: dict[str, Any], settings: list[str], message: str
) -> None:
    with pytest.raises(EstuneError, match=message):
        ensemble(str(model), None, [*SETTINGS, *settings], task=task(), **options)

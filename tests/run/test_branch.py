"""New runs from where others stood."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from estune.config import Config
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.share import pack
from estune.journal.verify import verify
from estune.run.branch import branch
from estune.run.trainer import Trainer
from tests.runs import assert_same_run, make_config, make_task


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(make_config(folder, model, steps=3), task=make_task(), monitors=[]).train()
    return folder


def test_a_branch_begins_with_the_weights_of_its_step(run: Path, tmp_path: Path) -> None:
    before = (run / "journal.jsonl").read_bytes()
    changed = {"steps": 2, "sigma": 0.03, "output_dir": tmp_path / "b"}
    branch(run, 1, task=make_task(), monitors=[], **changed).train()
    trunk, journal = Journal.read(run), Journal.read(tmp_path / "b")
    assert (run / "journal.jsonl").read_bytes() == before
    assert journal.header.fingerprint == trunk.steps[0].fingerprint
    assert journal.inherited == trunk.steps[:1]
    assert journal.steps[0].sigma == 0.03
    assert journal.settings["population"] == 4
    assert journal.settings["start_step"] == 1
    assert verify(tmp_path / "b").steps == 3


def test_a_branch_is_what_start_from_and_start_step_give(run: Path, model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "a", model, steps=2, start_from=run, start_step=2)
    Trainer(config, task=make_task(), monitors=[]).train()
    pack(run, tmp_path / "run.estune")
    changed = {"steps": 2, "output_dir": tmp_path / "b"}
    branch(tmp_path / "run.estune", 2, task=make_task(), monitors=[], **changed).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert Journal.read(tmp_path / "a").before == Journal.read(tmp_path / "b").before
    Trainer.resume(tmp_path / "a", steps=3, task=make_task(), monitors=[]).train()
    assert verify(tmp_path / "a").steps == 5


def test_noise_that_is_left_open_is_that_of_the_run_before(model: Path, tmp_path: Path) -> None:
    Trainer(make_config(tmp_path / "a", model, steps=1, noise="rank1"), task=make_task(), monitors=[]).train()
    config = make_config(tmp_path / "b", model, steps=1, noise="auto", start_from=tmp_path / "a")
    Trainer(config, task=make_task(), monitors=[]).train()
    assert Journal.read(tmp_path / "b").header.noise == "rank1"
    assert verify(tmp_path / "b").steps == 2
    with pytest.raises(EstuneError, match="was run with noise=rank1, found iid: set noise=rank1"):
        Trainer(config.model_copy(update={"noise": "iid", "output_dir": tmp_path / "c"}), task=make_task())


def test_a_branch_of_all_steps_goes_to_a_folder_of_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = branch(run, task=make_task(), monitors=[])
    trainer.close()
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("run-3-")
    assert Journal.read(made).header.fingerprint == Journal.read(run).fingerprint()
    assert Path.cwd() == tmp_path


def test_relative_paths_of_the_run_are_found_from_elsewhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).parents[2] / "examples" / "sums.py"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "sums.py").write_text(source.read_text())
    monkeypatch.chdir(tmp_path / "there")
    config = Config(**{**make_config(tmp_path / "a", model, steps=1).model_dump(), "task": "sums.py"})
    Trainer(config, monitors=[]).train()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    branch(tmp_path / "a", monitors=[], output_dir="b").train()
    assert (tmp_path / "here" / "b" / "final").is_dir()
    (tmp_path / "there" / "sums.py").write_text(source.read_text() + "\n")
    with pytest.raises(EstuneError, match=r"sums\.py has changed since you last ran it"):
        branch(tmp_path / "a", monitors=[], output_dir="c")
    branch(tmp_path / "a", monitors=[], output_dir="c", trust_task=True).close()
    assert os.getcwd() == str(tmp_path / "here")


def test_what_cannot_be_branched(run: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="run has 3 steps, not 4"):
        branch(run, 4, task=make_task())
    with pytest.raises(EstuneError, match="was run with weights=master, found copy"):
        branch(run, 2, task=make_task(), weights="copy", output_dir=tmp_path / "b")
    with pytest.raises(EstuneError, match="start_step is 2, and no start_from says of which run"):
        Trainer(make_config(tmp_path / "b", model, start_step=2), task=make_task(), monitors=[])
    assert not (tmp_path / "b").exists()

"""Runs that are gone on with and made longer, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.run.trainer import Trainer
from estune.weights.device import training_device
from tests.models import FUSABLE, save_model
from tests.runs import assert_same_run, make_config, make_task, metrics, run


def test_a_finished_run_can_be_made_longer(model: Path, tmp_path: Path) -> None:
    run(make_config(tmp_path / "long", model, steps=6))
    run(make_config(tmp_path / "short", model, steps=4))
    Trainer.resume(tmp_path / "short", steps=6, task=make_task(), monitors=[]).close()
    summary = Trainer.resume(tmp_path / "short", task=make_task(), monitors=[]).train()  # which knows the new length
    assert summary.steps == 6
    assert_same_run(tmp_path / "long", tmp_path / "short")


def test_an_older_run_without_a_learning_rate_goes_on_with_half_of_sigma(model: Path, tmp_path: Path) -> None:
    """As its journal means it, whatever a new run with as many members would take."""
    many: Any = {"population": 60, "prompts_per_step": 1, "max_new_tokens": 2, "steps": 3}
    run(make_config(tmp_path / "whole", model, learning_rate="0.5sigma", **many))
    whole = Journal.read(tmp_path / "whole")
    (tmp_path / "older").mkdir()
    older = replace(whole.header, config=whole.header.config | {"learning_rate": None})
    journal = Journal.create(tmp_path / "older", older)
    for record in whole.steps[:2]:
        journal.append_step(record)
    journal.close()
    Trainer.resume(tmp_path / "older", task=make_task(), monitors=[]).train()
    resumed = Journal.read(tmp_path / "older")
    assert [record.fingerprint for record in resumed.steps] == [record.fingerprint for record in whole.steps]
    assert resumed.settings["learning_rate"] == "0.5sigma"

    run(make_config(tmp_path / "new", model, **many))
    new = Journal.read(tmp_path / "new")
    assert new.settings["learning_rate"] == new.header.config["learning_rate"] == "0.707sigma"
    assert {record.learning_rate for record in new.steps} == {0.707 * 0.02}


def test_a_used_directory_is_refused_with_the_remedies(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make_config(folder, model, steps=1))
    before = (folder / "journal.jsonl").read_bytes()
    with pytest.raises(
        EstuneError,
        match=r"already holds a run: go on with `Trainer.resume\('.*/run', task=...\)`, give another --output-dir",
    ):
        run(make_config(folder, model, steps=1))
    assert (folder / "journal.jsonl").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(EstuneError, match="exists and is not empty"):
        run(make_config(tmp_path / "other", model, steps=1))


def test_resume_refuses_another_base_or_other_data(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", **FUSABLE)
    run(make_config(tmp_path / "run", base, steps=2))
    with pytest.raises(EstuneError, match="the data of task variety are not those"):
        Trainer.resume(tmp_path / "run", steps=4, task=make_task(evaluation=5), monitors=[])
    with pytest.raises(EstuneError, match="was trained on the task variety, not countdown: .* Trainer.resume"):
        Trainer.resume(tmp_path / "run", steps=4, monitors=[])
    save_model(base, seed=6, **FUSABLE)
    with pytest.raises(EstuneError, match="give the original with --model"):
        Trainer.resume(tmp_path / "run", steps=4, task=make_task(), monitors=[])
    with pytest.raises(EstuneError, match="this is no run"):
        Trainer.resume(base)


def test_resume_refuses_other_trained_tensors_and_another_type_of_live_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run(make_config(folder, model, steps=2))
    assert Journal.read(folder).settings["device"] == str(training_device("auto"))
    original = Journal.resume

    def resume(path: Path) -> Journal:
        journal = original(path)
        journal.settings |= changed
        return journal

    monkeypatch.setattr(Journal, "resume", resume)
    changed = {"device": "auto"}  # as journals said before
    Trainer.resume(folder, steps=3, task=make_task(), monitors=[]).train()
    changed = {"dtype": "bfloat16"}
    with pytest.raises(EstuneError, match="generates with float32 weights, which here, .* are loaded as bfloat16"):
        Trainer.resume(folder, steps=4, task=make_task(), monitors=[])
    changed = {"train_parameters": "!*norm*"}  # as where `auto` has meant more to an older version
    with pytest.raises(EstuneError, match=r"the run trains model\..*norm.*, and here train_parameters=!\*norm\* means"):
        Trainer.resume(folder, steps=4, task=make_task(), monitors=[])


def test_lost_metrics_come_back_on_resume(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Trainer(make_config(folder, model), task=make_task()).train()
    before = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(before.splitlines(keepends=True)[:2]) + '{"step": 2, "rew')
    Trainer.resume(folder, steps=5, task=make_task()).train()
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in metrics(folder)] == [0, 1, 2, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"steps": -1}, "steps: .*found -1"), ({"steps": 3}, "is done after 4 steps"), ({}, "is done after 4")],
)
def test_lengths_that_leave_nothing_to_do_are_refused(model: Path, tmp_path: Path, changed: Any, message: str) -> None:
    run(make_config(tmp_path / "run", model))
    with pytest.raises(EstuneError, match=message):
        Trainer.resume(tmp_path / "run", **changed, task=make_task(), monitors=[])
    assert Trainer.resume(tmp_path / "run", steps=5, task=make_task(), monitors=[]).train().steps == 5


def test_a_run_stopped_early_has_new_patience_when_resumed(model: Path, tmp_path: Path) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    run(make_config(tmp_path / "run", model, steps=9, eval_steps=1, early_stopping_patience=2), constant)
    summary = Trainer.resume(tmp_path / "run", steps=20, task=make_task(constant), monitors=[]).train()
    assert (summary.ended, summary.steps) == ("stopped early", 4)

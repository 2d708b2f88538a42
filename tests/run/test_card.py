"""Model cards: what the hub reads of them, what they say, and that nothing hangs on them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from estune.journal.journal import Journal
from estune.run.card import CARD, PICTURE, Card
from estune.run.trainer import Trainer
from tests.reports import make_run
from tests.runs import make_config, make_task


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(make_config(folder, model, steps=2, eval_steps=1), task=make_task()).train()
    return folder


def test_best_and_final_have_cards_that_the_hub_reads(run: Path, model: Path) -> None:
    journal = Journal.read(run)
    assert journal.best is not None
    for name, evaluation in (("best", journal.best), ("final", journal.evaluations[-1])):
        card = ModelCard.load(run / name / CARD)
        assert (card.data.library_name, card.data.base_model) == ("transformers", None)  # a directory is not on the hub
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {key: evaluation.metrics[f"eval_{key}"] for key in ("accuracy", "reward")}
        assert f"This is the checkpoint after step {evaluation.step}." in card.text
        assert f"`{model.name}`" in card.text
        assert f"({PICTURE})" in card.text
        assert (run / name / PICTURE).read_text().startswith("<svg")
        assert "variety, is the author's own" in card.text  # and so no command gives it


def test_a_card_names_the_base_on_the_hub_and_the_command(tmp_path: Path) -> None:
    journal = Journal.read(make_run(tmp_path / "run", "someone/model@" + "0" * 40))
    card = ModelCard(Card(journal, "me/tuned", len(journal.steps), 400).text())
    assert card.data.base_model == "someone/model"
    assert "estune train" in card.text
    assert "95% interval" in card.text


def test_where_nothing_was_better_the_base_model_is_shown_once(tmp_path: Path) -> None:
    journal = Journal.read(make_run(tmp_path / "run"))
    best, last = (Card(journal, "run", step, 8).text() for step in (0, len(journal.steps)))
    assert "| held out | before |\n" in best
    assert "after step 0: the base model itself." in best
    assert "| held out | before | after step 6 |\n" in last


def test_a_card_that_cannot_be_written_costs_a_run_nothing(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("estune.run.card.PICTURE", "curve.bmp")  # which nobody draws
    with caplog.at_level(logging.WARNING):
        Trainer(make_config(tmp_path / "run", model, steps=1), task=make_task()).train()
    assert "no model card was written: " in caplog.text
    assert Journal.read(tmp_path / "run").ended == "finished"
    assert not (tmp_path / "run" / "best" / CARD).exists()

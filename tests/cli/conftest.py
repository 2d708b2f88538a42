"""Runs that commands are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from estune.run.trainer import Trainer
from tests.command_line import SMALL, estune
from tests.models import FUSABLE, save_model
from tests.runs import make_config, make_task


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the embedded model, to be read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert estune("train", *SMALL, "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a task of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    Trainer(
        make_config(folder / "run", save_model(folder / "model", **FUSABLE), steps=2), task=make_task(), monitors=[]
    ).train()
    return folder / "run"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table is cut."""
    monkeypatch.setenv("COLUMNS", "300")

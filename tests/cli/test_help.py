"""`estune --help` and what else is said without a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from estune.tasks import catalogue
from tests.command_line import estune


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['estune', '--help']\n"
        "from estune.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numba', 'numpy', 'pyarrow', 'wandb', 'ray'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "eval", "replay", "report", "probe", "sweep", "compare", "estimate", "tasks", "settings"):
        assert f" {command} " in done.stdout


def test_no_command_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune() == 0
    assert "estune train" in capsys.readouterr().out


def test_tasks_are_listed_with_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert estune("tasks") == 0
    out = capsys.readouterr().out
    for name, summary, data in catalogue():
        assert name in out
        assert summary in out
        assert data in out

"""The command line called in this process, on runs of a second or two."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from estune import cli

SMALL = ["--steps=2", "--population=4", "--prompts_per_step=8", "--task.train_size=40", "--task.eval_size=20"]
QUICK = [*SMALL, "--report_to", "none", "--max_new_tokens", 4]


def estune(*arguments: Any) -> int:
    """Run a command in this process; its exit code."""
    before = sys.argv
    sys.argv = ["estune", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a refused command says: exit code 1 and one line."""
    capsys.readouterr()
    assert estune(*arguments) == 1
    error = capsys.readouterr().err.strip()
    (line,) = [text for text in error.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in error
    return line


def usage(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command line that cannot be read says: exit code 2 and one line."""
    capsys.readouterr()
    assert estune(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line

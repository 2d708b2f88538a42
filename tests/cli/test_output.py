"""What a command shows on a terminal until it begins."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from estune.cli.output import opening
from estune.pool.waiting import told_while
from tests.processes import until


@pytest.mark.parametrize("model", ["M", "a-folder-of-a-long-name/" * 6])
def test_what_is_waited_for_fits_on_a_line_with_its_bar(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long name is cut off, and how far it has come is not."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("estune.cli.output.get_console", lambda: terminal)
    with opening("train M"), told_while(f"loading {model}", so_far=lambda: ": 5 of 20 tensors", share=lambda: 0.25):
        until(lambda: "tensors" in screen.getvalue(), 60)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    line = next(line for line in re.split(r"[\r\n]+", shown) if "tensors" in line).rstrip()
    assert re.fullmatch(r". loading \S+: 5 of 20 tensors  \d+ s +━{4}[╸╺]━+ +\d+ s left", line)
    assert len(line) <= 80
    assert ("…" in line) == (model != "M")

"""The measurement of what a terminal shows first, on commands that say when they show what."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from bench.speed.first_output import waits

SHOWS = """
import os, pathlib, sys, time
while time.process_time() < 0.05:  # the system counts in hundredths of a second
    pass
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
print("\\x1b[32mhello\\x1b[0m, you", flush=True)
for bar in ("━━━━ 0%", "━╺━━ 12%", "━━╺━ 50%"):
    print("\\r\\x1b[2K" + bar, end="", flush=True)
    time.sleep(0.3)
time.sleep(600)
"""


def test_the_first_line_and_the_first_bar_that_has_moved_are_found_and_the_command_is_ended(tmp_path: Path) -> None:
    found = waits([sys.executable, "-c", SHOWS, str(tmp_path / "pid")])
    assert found["it says"] == "hello, you"
    assert found["it shows"] == "━╺━━ 12%"
    assert 0 < found["first line"] <= found["bar"]
    assert found["processor"] > 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_command_whose_bar_never_moves_is_said_with_its_last_words() -> None:
    with pytest.raises(TimeoutError, match=r"no bar has moved; it said .*only words"):
        waits([sys.executable, "-c", "print('only words, 0%')"])

"""Whether programs can be isolated here, and what their sandboxes leave behind."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import within


@functools.cache
def available() -> bool:
    """Whether the system allows namespaces, by another's word than that of what is tested."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", *(["--user"] if os.getuid() else []), "-mnpiu", "--fork", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def nothing_left_behind(sandboxes_alone: None) -> Iterator[None]:
    before = helpers(), folders()
    yield
    within(2, lambda: (helpers(), folders()) == before)
    assert (helpers(), folders()) == before


def helpers() -> set[str]:
    """Processes of sandboxes: keepers, programs and what those started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"jail.py" in words or b"-X\0utf8" in words or b"sandbox's sleeper" in words:
            found.add(path.parent.name)
    return found


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("estune-sandbox-*"))

"""Files that appear whole or not at all, and files that one process has for itself."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from estune.errors import EstuneError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it takes the target's place, on failure it is removed.

    A target has one writer at a time. What a killed one leaves lies under the same names, and the next one clears it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    _tidy(target, temporary, old)
    try:
        yield temporary
        if target.is_dir():  # a directory cannot be replaced in one call: set the old one aside first
            os.rename(target, old)
            os.rename(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        _tidy(target, temporary, old)


def locked(path: Path, mode: str) -> Any:
    """The file, open for this process alone. Unbuffered: after a failed write nothing is left to be written later.

    Raises:
        EstuneError: another process has it.
    """
    file = path.open(mode, buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise EstuneError(f"{path} is being written by another process; wait for it or stop it") from error
    return file


def read_claim(path: Path, *keys: str) -> dict[str, Any]:
    """What a sweep or a comparison wrote of itself into its folder, an object with these keys.

    Raises:
        EstuneError: it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in keys):
        raise EstuneError(f"{path} is damaged; put it back as it was, or give another --output-dir")
    return found


def _tidy(target: Path, temporary: Path, old: Path) -> None:
    """Remove what is left over; an old directory whose place was not taken goes back there."""
    if old.exists() and not target.exists():
        os.rename(old, target)
    _remove(temporary)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Answers that have been given before, on disk: a table of texts that several processes read and write at once."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from estune.errors import EstuneError
from estune.files import make_folder

_WAIT = 60.0  # seconds for another process that writes


class Cache:
    """Texts by key, in a SQLite file. Once `put` has returned, a text outlives a kill and a power cut.

    It is used by the thread that opened it. SQLite's default journal, unlike its write-ahead log, also works on network
    file systems that lock files.

    Args:
        path: the file; it and its folder are made if they are not there.

    Raises:
        EstuneError: the file cannot be opened or written, or is something else; `get` and `put` raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.absolute().parent)
        try:
            self._file = sqlite3.connect(path, timeout=_WAIT, isolation_level=None)
        except sqlite3.Error as error:
            raise self._explained(error) from error
        try:
            self._run("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
        except EstuneError:
            self.close()
            raise

    def get(self, key: str) -> str | None:
        """The text of a key; None where there is none."""
        found = self._run("SELECT answer FROM answers WHERE key = ?", key)
        return None if not found else str(found[0][0])

    def put(self, key: str, answer: str) -> None:
        """Keep a text, unless another process was first."""
        self._run("INSERT OR IGNORE INTO answers VALUES (?, ?)", key, answer)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _run(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        try:
            return self._file.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> EstuneError:
        return EstuneError(f"cache {self.path}: {error}; remove the file, free its disk, or name another")

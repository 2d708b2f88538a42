"""A process that ends the programs of rollouts where the one that started them cannot: because it was killed.

It is told their keys, one a line, before they start. When its standard input ends, it ends whoever has one of them.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import psutil

KEY = "OPENAI_API_KEY"
"""The environment variable in which a program, and what it starts, has the key."""


class Keeper:
    """The process, for the one that starts programs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "estune.agents.keeper"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )

    def tell(self, key: str) -> None:
        """Tell it a key, before a program has it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{key}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        """Let it end the programs that are left, and wait until it has."""
        self._process.communicate()


def end_all_with(keys: set[str]) -> None:
    """Kill all processes that have one of these keys."""
    if not keys:
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(KEY) in keys:
                process.kill()


def main() -> None:
    """Listen until standard input ends."""
    end_all_with({line.strip() for line in sys.stdin})


if __name__ == "__main__":
    main()

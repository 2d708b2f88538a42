"""How far an engine has come with what it generates: counted as it decodes, and read by whoever shows it.

A process has one engine at work, so the counts are the process's. An engine that works for another process counts in a
file that both have mapped: to look sends no message, and waits for nothing that could hang.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Progress(NamedTuple):
    """What engines have done, and the time it took them, all engines together.

    Attributes:
        read: tokens of prompts that were read.
        reading: nanoseconds that this took.
        settled: of the `max_new_tokens` places of each completion, those that are settled: a token stands there, or
            the completion ended before.
        tokens: tokens that were generated.
        writing: nanoseconds that this took.
    """

    read: int = 0
    reading: int = 0
    settled: int = 0
    tokens: int = 0
    writing: int = 0

    def since(self, before: Progress) -> Progress:
        """What has been done since."""
        return Progress(*(now - then for now, then in zip(self, before, strict=True)))


def together(parts: Iterable[Progress]) -> Progress:
    """The sum of several engines'."""
    return Progress(*map(sum, zip(Progress(), *parts, strict=True)))


class Counts:
    """Counts of one engine, from 0 on."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(Progress()), np.int64)

    def map(self, file: Path) -> None:
        """Count from here on in a file that another process looks at too; it is made if it is not there."""
        with file.open("a+b") as opened:
            opened.truncate(self._counts.nbytes)
            self._counts = np.frombuffer(mmap.mmap(opened.fileno(), self._counts.nbytes), np.int64)

    def now(self) -> Progress:
        """The counts so far."""
        return Progress(*self._counts.tolist())

    def add(self, more: Progress) -> None:
        """Count what an engine has done."""
        self._counts += more


OWN = Counts()
"""The counts of this process's engine."""


class Meter:
    """Counts a batch while it is decoded. The time since the last call goes to what is counted."""

    def __init__(self) -> None:
        self._last = time.perf_counter_ns()

    def read(self, tokens: int) -> None:
        """Count `tokens` tokens of prompts as read."""
        OWN.add(Progress(read=tokens, reading=self._lap()))

    def wrote(self, tokens: int, spared: int = 0) -> None:
        """Count tokens as generated, and `spared` others that will not be, as their completions have ended."""
        OWN.add(Progress(settled=tokens + spared, tokens=tokens, writing=self._lap()))

    def _lap(self) -> int:
        before = self._last
        self._last = time.perf_counter_ns()
        return self._last - before

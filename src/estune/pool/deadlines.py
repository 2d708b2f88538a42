"""How long to wait for another process, and what is said of one that did not answer."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict

START_SECONDS = 1800.0
"""For a model to be loaded, and for a rebuilt one's base: a checkpoint may come over a network."""
FIRST_SECONDS = 600.0
LEAST_SECONDS = 60.0


class Lost(Exception):
    """A process that evaluates is gone, or of no use any more. The message says why, in one line."""


class Deadlines:
    """Seconds to wait for a call, judged by how long calls of its kind took so far.

    Args:
        fixed: seconds for every call but those that load a model; None to judge them.
    """

    def __init__(self, fixed: float | None) -> None:
        self._fixed = fixed
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def of(self, kind: str, units: int = 1) -> float:
        """Seconds to wait for a call of a kind that does the work of `units`."""
        if kind == "open":
            return START_SECONDS
        if kind == "rebuild":
            return START_SECONDS + units * (self.of("apply") if self._seconds["apply"] else LEAST_SECONDS)
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            seconds = self._seconds[kind]
            return max(LEAST_SECONDS, 10 * statistics.median(seconds)) if seconds else FIRST_SECONDS

    def took(self, kind: str, seconds: float) -> None:
        """Remember how long a call took."""
        with self._lock:
            self._seconds[kind] = [*self._seconds[kind][-99:], seconds]

"""Signals while a command goes on: Ctrl-C in the middle of an import, SIGTERM that lets it clean up.

An import is recognized by the stack, and its end by a timer, for this reason. A command spends its first seconds
importing torch, which is when people press Ctrl-C. What is raised there is often lost (see `spared_imports`), so it has
to wait for the end of the import. Python has no event for that end: an import hook sees only the beginning, and not the
imports that began before it was set. But every import runs in frames of `importlib._bootstrap`, which lie on the stack
exactly as long as it goes on. A handler is given the frame that it interrupts, so it need only look; and the timer asks
again, in the main thread, which alone runs handlers, until there is no such frame. Outside of imports, nothing differs
from Python's own Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_POLL_SECONDS = 0.05


@contextmanager
def spared_imports() -> Iterator[None]:
    """Within this, a Ctrl-C in the middle of an import raises when the import has ended; a second one at once.

    Raised within the import it might be lost, and the command go on as if nothing had happened: importlib drops what is
    raised in its callbacks, and some packages drop whatever stops their imports. Or torch's C code meets it and aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waits = False

    def wait(seconds: float) -> None:
        nonlocal waits
        waits = seconds > 0
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def on_interrupt(number: int, frame: FrameType | None) -> Any:
        if not waits and _imports(frame):
            wait(_POLL_SECONDS)
        else:
            wait(0)
            raise KeyboardInterrupt

    def on_alarm(number: int, frame: FrameType | None) -> Any:
        if waits and not _imports(frame):
            wait(0)
            raise KeyboardInterrupt

    previous = [(s, signal.signal(s, to)) for s, to in ((signal.SIGINT, on_interrupt), (signal.SIGALRM, on_alarm))]
    try:
        yield
    finally:
        wait(0)
        for number, handler in previous:
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way in a frame, or in one of those that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def terminable() -> Iterator[None]:
    """Within this, SIGTERM raises SystemExit, so that what started child processes ends them on its way out."""

    def handler(number: int, frame: FrameType | None) -> Any:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

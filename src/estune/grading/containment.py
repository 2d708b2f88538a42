"""What a reward function does to the process that calls it, undone.

Rewards are trusted: this is for what a reward does without meaning it, or what a library that it calls does. Not undone
is what it does to memory, to open files other than the standard ones, to the environment, or in threads of its own; nor
anything that an `async` function does, which shares the process with others at the same time.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

from estune.errors import printable

_PRINTED = 2000  # characters kept of what one call prints
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)
_RAISING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)  # whose handlers raise: to stop at once, or after an import
_TIMERS = {"alarm": signal.ITIMER_REAL, "virtual timer": signal.ITIMER_VIRTUAL, "profiling timer": signal.ITIMER_PROF}
_STREAMS = ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")
_LIMITS = {
    name: getattr(resource, f"RLIMIT_{name}")
    for name in ("AS", "CORE", "CPU", "DATA", "FSIZE", "NOFILE", "NPROC", "STACK")
}


class Around:
    """What a call left behind: `notes`, a line each, on what it printed and on what had to be undone.

    `stopped` tells that a signal such as Ctrl-C's stopped it: what it raises then is not its own error.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.undone: list[str] = []
        self._bytes = _Bytes()
        self.output = io.TextIOWrapper(self._bytes, "utf-8", "replace", write_through=True)

    @property
    def notes(self) -> list[str]:
        """The notes, a line each, without what would move a cursor."""
        printed = self._bytes.getvalue().decode(errors="replace")
        return [printable(line) for line in (*printed.splitlines(), *self.undone) if line.strip()]


@contextmanager
def contained(state: State | None = None) -> Iterator[Around]:
    """Within this, what is printed is kept; after it, the process is as it was. A child forked within ends here.

    Args:
        state: what the process should be like, if it only grades: nobody else changes it, and any signal means the end.
            If None, it should be as it is now.
    """
    around = Around()
    before = state or State()
    kept = sys.stdout
    sys.stdout = around.output
    try:
        with _listening(around) if state is None else nullcontext():
            yield around
    finally:
        if os.getpid() != before.pid:
            os._exit(0)  # it would go on as a second trainer
        sys.stdout = kept
        around.undone = before.restore()
        if state is None:
            before.close()


@contextmanager
def _listening(around: Around) -> Iterator[None]:
    """Within this, it is noted if a handler of a signal raises."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler is called
        return

    def wrapped(handler: Any) -> Any:
        def listener(number: int, frame: FrameType | None) -> Any:
            try:
                return handler(number, frame)
            except BaseException:
                around.stopped = True
                raise

        return listener

    before = {number: signal.getsignal(number) for number in _RAISING}
    listeners = {number: wrapped(handler) for number, handler in before.items() if callable(handler)}
    for number, listener in listeners.items():
        signal.signal(number, listener)
    try:
        yield
    finally:
        for number, listener in listeners.items():
            if signal.getsignal(number) is listener:
                signal.signal(number, before[number])


class _Bytes(io.BytesIO):
    """The part of what is printed that is kept. It cannot be closed, and its `fileno` is the real descriptor."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: max(0, _PRINTED - self.tell())])
        return len(data)

    def close(self) -> None:
        pass

    def fileno(self) -> int:
        return 1


class State:
    """The state of a process that a reward function may change, and must find unchanged at its next call."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._folder = _folder()
        self._standard = {number: _copy(number) for number in (0, 1, 2)}
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._idle = {name: timer for name, timer in _TIMERS.items() if not signal.getitimer(timer)[0]}
        self._streams = {name: getattr(sys, name) for name in _STREAMS}
        known = {id(stream): stream for stream in self._streams.values()}  # mostly three, each under two names
        self._standard_streams = [_Standard(stream) for stream in known.values() if _number(stream) in self._standard]
        self._limits = {name: resource.getrlimit(which) for name, which in _LIMITS.items()}

    def restore(self) -> list[str]:
        """Put everything back; return what had to be put back, in words."""
        undone = []
        if self._folder is not None and _folder() != self._folder:
            os.chdir(self._folder)
            undone.append(f"it changed the working directory: back in {self._folder}")
        for number, copy in self._standard.items():
            if copy is not None and not _same(number, copy):
                os.dup2(copy, number)
                undone.append(f"it closed or replaced the standard descriptor {number}: opened again")
        undone += self._restore_streams()
        if threading.current_thread() is threading.main_thread():
            undone += self._restore_signals()
        return undone + self._restore_limits()

    def close(self) -> None:
        """Close the copies of the standard descriptors."""
        for copy in self._standard.values():
            if copy is not None:
                os.close(copy)

    def _restore_streams(self) -> list[str]:
        undone = []
        for name, stream in self._streams.items():
            if getattr(sys, name, None) is not stream:
                setattr(sys, name, stream)
                undone.append(f"it replaced sys.{name}: put back")
        for standard in self._standard_streams:
            if standard.reopen():
                undone.append(f"it closed Python's stream of the standard descriptor {standard.number}: opened again")
        return undone

    def _restore_signals(self) -> list[str]:
        undone = []
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
                undone.append(f"it changed what {signal.Signals(number).name} does: put back")
        for name, timer in self._idle.items():
            if signal.getitimer(timer)[0]:
                signal.setitimer(timer, 0)
                undone.append(f"it left {'an' if name == 'alarm' else 'a'} {name}: stopped")
        return undone

    def _restore_limits(self) -> list[str]:
        undone = []
        for name, which in _LIMITS.items():
            soft, hard = self._limits[name]
            if resource.getrlimit(which) == (soft, hard):
                continue
            try:
                resource.setrlimit(which, (soft, hard))
                undone.append(f"it changed RLIMIT_{name}: put back")
            except (ValueError, OSError):
                with suppress(ValueError, OSError):
                    resource.setrlimit(which, (resource.getrlimit(which)[1],) * 2)
                undone.append(f"it lowered RLIMIT_{name} for good: the run goes on with less")
        return undone


class _Standard:
    """Python's stream of a standard descriptor, which must stay usable for others that hold it, such as loggers."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self.number = stream.fileno()
        self._mode = "rb" if stream.readable() else "wb"
        self._how: dict[str, Any] = {
            name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")
        }

    def reopen(self) -> bool:
        """Open the same object again if it was closed or detached; return whether it was."""
        with suppress(ValueError):
            if not self._stream.closed:
                return False
        self._stream.__init__(open(self.number, self._mode, closefd=False), **self._how)  # type: ignore[misc]  # noqa: SIM115
        return True


def _number(stream: Any) -> int | None:
    """The descriptor of one of Python's own streams, if it is open."""
    if type(stream) is not io.TextIOWrapper or stream.closed:
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it was deleted


def _copy(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:
        return None  # a process may have been started without


def _same(number: int, copy: int) -> bool:
    try:
        return os.path.sameopenfile(number, copy)
    except OSError:
        return False

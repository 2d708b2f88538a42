"""An object in a process of its own: nothing that estune sets for its process helps, or hinders, another contestant."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

LAST_SECONDS = 30  # to end what the object has started: left to itself, that keeps its memory on the device


class Process:
    """Builds an object in a new process, and calls its methods there.

    Args:
        kind: what builds the object, importable by name.
        arguments: what it takes.
    """

    def __init__(self, kind: Callable[..., Any], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, end = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(end, kind, arguments), daemon=True)
        self._process.start()
        self.wait()

    def start(self, threads: int, method: str, *arguments: Any) -> None:
        """Let a method begin, with so many threads for torch."""
        self._pipe.send((threads, method, arguments))

    def wait(self, timeout: float | None = None) -> tuple[Any, float]:
        """What the method returned, and its seconds. Raises what it raised, or `TimeoutError`."""
        if not self._pipe.poll(timeout):
            raise TimeoutError
        result, seconds = self._pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result, seconds

    def call(self, threads: int, method: str, *arguments: Any) -> tuple[Any, float]:
        """Start, and wait."""
        self.start(threads, method, *arguments)
        return self.wait()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.join(LAST_SECONDS)
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, kind: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    multiprocessing.current_process().daemon = False  # or what it serves could start no process, as vLLM does
    torch.set_num_threads(1)
    served = _timed(pipe, lambda: kind(*arguments), keep=True)
    while True:
        try:
            threads, method, arguments = pipe.recv()
        except EOFError:  # the other side is gone
            return
        torch.set_num_threads(threads)
        _timed(pipe, lambda: getattr(served, method)(*arguments))  # noqa: B023


def _timed(pipe: Connection, call: Callable[[], Any], *, keep: bool = False) -> Any:
    """Send what `call` returns, or raises, with its seconds; or keep it here, and return it."""
    start, result = time.perf_counter(), None
    try:
        result = call()
        pipe.send((None if keep else result, time.perf_counter() - start))
    except Exception as error:
        pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), time.perf_counter() - start))
    return result

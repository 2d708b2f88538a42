"""Messages between the trainer and a grader: a length of 4 bytes, then so many bytes.

Whatever the other side does, no wait here is longer than was asked for, and no message longer than `LONGEST`. The
trainer sends pickles, which a grader may trust. A grader answers in JSON: even if a completion has taken it over, its
answer cannot make the trainer do anything.
"""

from __future__ import annotations

import socket
import struct
import time

LONGEST = 64 << 20
"""Bytes of the longest message."""

_LENGTH = struct.Struct("!I")


class Garbled(ValueError):
    """What the other side sent is no message."""


class Wire:
    """One end of a connected socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def send(self, message: bytes, seconds: float | None = None) -> None:
        """Send a message within this many seconds.

        Raises:
            TimeoutError: the other side did not take it.
            ConnectionError: the other side is gone.
        """
        self._socket.settimeout(seconds)
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, seconds: float | None = None) -> bytes:
        """Receive the next message, all of which must come within this many seconds.

        Raises:
            TimeoutError: it did not.
            EOFError, ConnectionError: the other side is gone.
            Garbled: its length is beyond `LONGEST`.
        """
        end = None if seconds is None else time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, end))
        if length > LONGEST:
            raise Garbled(f"a message of {length} bytes, more than {LONGEST}")
        return self._exactly(length, end)

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()

    def _exactly(self, count: int, end: float | None) -> bytes:
        while len(self._received) < count:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise EOFError
            self._received += piece
        found = bytes(self._received[:count])
        del self._received[:count]
        return found

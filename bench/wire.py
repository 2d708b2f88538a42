"""A wire between a run and a server: a proxy that counts bytes and, if told so, is as slow and lossy as a far one.

It emulates what a connection sees of such a path. A round trip takes `delay` more, half of it each way, in order. A
lost packet makes what follows wait until it would have been sent again: 200 ms or the round trip, whichever is more.
Each 1,448 bytes are a packet. Its rate has no limit, and no window closes after a loss: what TCP does beyond one
retransmission is not in it.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Self
from urllib.parse import urlsplit

PACKET = 1448
LEAST_STALL = 0.2  # seconds: TCP's least retransmission timeout


class Proxy:
    """Listens at `url`, and passes on to a server.

    Args:
        target: the server's address.
        delay: seconds of a round trip that the path adds.
        loss: share of packets that are lost.
        seed: of what is lost.

    Attributes:
        bytes: that have come by, both ways.
        stalls: packets that were lost.
        stalled: seconds that they made others wait.
    """

    def __init__(self, target: str, delay: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        place = urlsplit(target)
        self._target = (place.hostname or "", place.port or 80)
        self._delay = delay
        self._loss = loss
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.bytes = 0
        self.stalls = 0
        self.stalled = 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        time.sleep(self._delay)  # of the handshake
        try:
            far = socket.create_connection(self._target)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            on_its_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
            threading.Thread(target=self._take, args=(one, on_its_way), daemon=True).start()
            threading.Thread(target=self._give, args=(other, on_its_way), daemon=True).start()

    def _take(self, source: socket.socket, on_its_way: SimpleQueue[tuple[float, bytes]]) -> None:
        due = 0.0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                due = max(due, time.monotonic() + self._delay / 2) + self._wait(len(data))
                on_its_way.put((due, data))
        on_its_way.put((time.monotonic() + self._delay / 2, b""))

    def _give(self, target: socket.socket, on_its_way: SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = on_its_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _wait(self, size: int) -> float:
        """Count what comes by; seconds that it is held up by losses."""
        packets = -(-size // PACKET)
        with self._lock:
            lost = sum(self._chance.random() < self._loss for _ in range(packets))
            held = lost * max(LEAST_STALL, self._delay)
            self.bytes += size
            self.stalls += lost
            self.stalled += held
        return held

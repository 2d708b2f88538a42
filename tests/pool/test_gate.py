"""Readers side by side, a writer alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from estune.pool.gate import Gate


def test_a_writer_is_alone_and_readers_are_not() -> None:
    gate = Gate()
    inside: list[str] = []
    together: list[int] = []
    lock = threading.Lock()

    def read() -> None:
        with gate.reading():
            with lock:
                inside.append("reader")
                assert "writer" not in inside
                together.append(len(inside))
            time.sleep(0.002)
            with lock:
                inside.remove("reader")

    def write() -> None:
        with gate.writing():
            assert not inside
            inside.append("writer")
            time.sleep(0.002)
            inside.remove("writer")

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(write if number % 5 == 0 else read) for number in range(200)]
        for future in found:
            future.result()
    assert max(together) > 1


def test_a_writer_who_waits_goes_before_readers_who_come_later() -> None:
    gate = Gate()
    order: list[str] = []
    waiting = threading.Event()

    def write() -> None:
        waiting.set()
        with gate.writing():
            order.append("writer")

    def read() -> None:
        with gate.reading():
            order.append("reader")

    with gate.reading():
        writer = threading.Thread(target=write)
        writer.start()
        waiting.wait()
        time.sleep(0.05)
        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.05)
        assert order == []
    writer.join()
    reader.join()
    assert order == ["writer", "reader"]


def test_an_error_inside_lets_others_in() -> None:
    gate = Gate()
    for side in (gate.reading, gate.writing):
        try:
            with side():
                raise ValueError
        except ValueError:
            pass
    with gate.writing():
        pass
    with gate.reading():
        pass

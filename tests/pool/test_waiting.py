"""What is told while something takes long."""

from __future__ import annotations

import logging
import threading

import pytest

from estune.pool.waiting import told_while


def test_a_long_wait_is_told_again_and_again_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    enough = threading.Event()
    told: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        if len(told) == 3:
            enough.set()
        return True

    caplog.handler.addFilter(take)
    with told_while("loading M with vllm", first=0.01, then=0.01):
        assert enough.wait(60)
    assert all(word.startswith("still loading M with vllm, for ") for word in told)


def test_what_is_soon_over_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), told_while("loading M"):
        _ = 1 // 0
    assert not caplog.messages

"""A server of a judge that is always there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.judges import Served, serving


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as server:
        yield server

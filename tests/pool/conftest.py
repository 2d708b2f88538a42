"""What runs ask servers with."""

from __future__ import annotations

import pytest

from estune.pool.remote.handle import KEY
from tests.pool.far import SECRET


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has the key that servers of tests ask for."""
    monkeypatch.setenv(KEY, SECRET)

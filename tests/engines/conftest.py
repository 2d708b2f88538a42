"""A model for PyTorch's own operations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk that the fused decoder does not take."""
    return save_model(tmp_path_factory.mktemp("models") / "plain")

"""Many runs: of a model that decodes fast."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(fused_model: Path) -> Path:
    return fused_model

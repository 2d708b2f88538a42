"""What a configuration says of a model, where it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estune.errors import EstuneError
from estune.shapes import read_shape
from tests.models import build_config


def test_weights_of_a_type_without_kernels_are_refused(tmp_path: Path) -> None:
    settings = {**build_config("llama").to_dict(), "dtype": "float64"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(EstuneError, match="its weights are float64; take one whose are one of float32, bfloat16, flo"):
        read_shape(tmp_path)

"""Directories that are no usable model, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from estune.completion import Sampling
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.models import save_model


def refuse(tmp_path: Path, change: str) -> Path:
    """A model directory with one thing wrong."""
    directory = save_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    weights = directory / "model.safetensors"
    if change == "encoder-decoder":
        config |= {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    elif change == "classifier":
        config |= {"architectures": ["Qwen2ForSequenceClassification"]}
    elif change == "unknown type":
        config |= {"model_type": "nonesuch"}
    elif change == "more layers":
        config |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    elif change == "other shape":
        config |= {"intermediate_size": 128}
    elif change == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif change == "no weights":
        weights.unlink()
    elif change == "no tokenizer":
        for path in directory.glob("*tok*"):
            path.unlink()
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    elif change == "broken tokenizer":
        (directory / "tokenizer.json").write_text("{")
    (directory / "config.json").write_text("{" if change == "broken config" else json.dumps(config))
    if change == "no config":
        (directory / "config.json").unlink()
    return directory


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no config", "without config.json"),
        ("broken config", "cannot be loaded"),
        ("no weights", "holds no .safetensors weights"),
        ("cut weights", "cannot be loaded"),
        ("more layers", "lacks 12 of the weights"),
        ("other shape", "cannot be loaded"),
        ("encoder-decoder", "not a causal language model"),
        ("classifier", "Qwen2ForSequenceClassification is not a causal"),
        ("unknown type", "cannot be loaded"),
        ("no tokenizer", "no tokenizer in this directory"),
        ("broken tokenizer", "tokenizer cannot be loaded"),
    ],
)
def test_directory_that_is_no_usable_model(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(EstuneError, match=says) as caught:
        TransformersEngine(refuse(tmp_path, change))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/nowhere/at/all", "no such directory"),
        ("./nowhere", "no such directory"),
        ("nobody/nothing-of-the-sort", "nor to be had from the hub"),
        ("nothing-of-the-sort", "nor to be had from the hub"),
        (__file__, "is a file, not a checkpoint"),
    ],
)
def test_model_that_is_not_there(model: str, says: str) -> None:
    with pytest.raises(EstuneError, match=says) as caught:
        TransformersEngine(model)
    assert "\n" not in str(caught.value)


def test_model_by_an_embedded_name() -> None:
    engine = TransformersEngine("tiny")
    assert engine.name == "tiny"
    assert len(engine.generate(engine.encode(["1"]), Sampling(2))) == 1

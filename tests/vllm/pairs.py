"""The same model in vLLM and in transformers, the latter being what the former is measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from estune.config import Config
from estune.engines.transformers import TransformersEngine
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.parameter_map import Place
from estune.engines.vllm.weights import VllmWeights
from estune.es.strategy import Member, Update
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from estune.weights.storage import as_array
from estune.weights.weights import Weights

UPDATE = Update(0, (Member(3), Member(2**64 - 4, -1), Member(9)), (0.01, -0.02, 0.0), decay=-0.01, rounding_seed=5)
PROMPTS = [[(7 * row + i) % 320 for i in range(3 + row % 40)] for row in range(24)]


def settings(engine: VllmEngine, path: Path, **options: Any) -> Config:
    return Config(model=str(path), engine="vllm", dtype=engine.dtype, gpus_per_worker=engine.parallel, **options)


def open_weights(engine: VllmEngine, path: Path, **options: Any) -> VllmWeights:
    return VllmWeights(engine, Checkpoint(path), settings(engine, path, **options), base_on_host=False)


def open_reference(path: Path, dtype: str, **options: Any) -> tuple[TransformersEngine, Weights]:
    """The model and its weights in transformers."""
    checkpoint = Checkpoint(path)
    engine = TransformersEngine(path, dtype=dtype)
    pattern = options.pop("train_parameters", "*")
    weights = Weights(
        trained_parameters(engine.model, checkpoint.tensors, pattern),
        policy=options.pop("weights", "master"),
        **options,
    )
    if weights.rule.how.base_dtype:
        weights.load(checkpoint)
    return engine, weights


def gathered(engine: VllmEngine, weights: Weights) -> dict[str, np.ndarray[Any, Any]]:
    """The live weights that vLLM's processes hold, by checkpoint name, put together by hand from the layers' tensors.

    A replica must hold what the others do.
    """
    whole = {p.name: np.zeros(p.tensor.shape, as_array(p.tensor).dtype) for p in weights.parameters}
    filled = {name: np.zeros(array.shape, bool) for name, array in whole.items()}
    for places, tensors in zip(engine.call("placed"), engine.call("live_arrays"), strict=True):
        for place in places:
            if place.name in whole:
                _put(place, tensors[place.tensor], whole[place.name], filled[place.name])
    assert all(array.all() for array in filled.values())
    return whole


def _put(place: Place, tensor: Any, whole: Any, filled: Any) -> None:
    part = place.part
    held = tensor.reshape(-1, part.width)[place.row : place.row + part.rows]
    columns = slice(part.column, part.column + part.width)
    target, done = (a.reshape(-1, part.pitch)[part.row : part.row + part.rows, columns] for a in (whole, filled))
    assert np.array_equal(target[done], held[done])
    target[:], done[:] = held, True


def live(weights: Weights) -> dict[str, np.ndarray[Any, Any]]:
    return {p.name: as_array(p.tensor).reshape(p.tensor.shape) for p in weights.parameters}

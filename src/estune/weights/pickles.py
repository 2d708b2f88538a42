"""Weights in PyTorch's own files, `pytorch_model.bin`: made into safetensors, once.

Such a file is a pickle, which could run any code when it is loaded. PyTorch's `weights_only` loads tensors and nothing
else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from estune.errors import EstuneError, first_line
from estune.files import user_cache
from estune.weights.converted import made_once, state_of

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
PICKLES = (INDEX, "pytorch_model*.bin")
"""What a model's weights in PyTorch's own files are called."""


def in_safetensors(folder: Path, companions: Iterable[Path]) -> Path:
    """The folder of a model or, if its weights are in PyTorch's own files alone, of a copy in the user's cache.

    Args:
        folder: the model's.
        companions: further files that go into the copy.

    Raises:
        EstuneError: the files hold other things than tensors, or cannot be read or written.
    """
    files = [] if any(folder.glob("*.safetensors")) else _weight_files(folder)
    if not files:
        return folder
    others = list(companions)

    def make(copy: Path) -> None:
        copy.mkdir()
        for file in others:
            shutil.copy(file, copy / file.name)
        _convert(files, copy)

    target = user_cache("safetensors") / state_of([*files, *others]) / folder.resolve().name
    return made_once(target, make, f"model {folder} has its weights in {SINGLE} alone: making safetensors of them")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise EstuneError(f"{index} is not an index of weights: it cannot be read; copy or save it again") from error
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing is not None or not files:
        raise EstuneError(f"{index} names {missing or 'no file'}, which is not there: copy or download the model again")
    return files


def _convert(files: list[Path], folder: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        # Tied tensors share their memory, which safetensors do not.
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in _tensors(file).items()}
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(file: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in many ways
        why = first_line(error)
        if isinstance(error, UnpicklingError):  # PyTorch's advice is to load it without this guard
            why = "it holds other things, or is damaged"
        raise EstuneError(
            f"{file} cannot be loaded as tensors alone ({why:.200}); take the model in safetensors, or save it with "
            "save_pretrained"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in found.items()):
        raise EstuneError(f"{file} is no table of tensors by name; save the model with save_pretrained")
    return found

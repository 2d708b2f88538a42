"""Where a run begins: at a model's own tensors, or at those of an adapter over it.

A new adapter's A is estune's own noise, by a seed, and its B zero, so that it changes nothing yet. Who has the model
and the settings has the adapter too, to the bit: replay needs no more than for a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from estune.errors import EstuneError
from estune.files import user_cache
from estune.weights.adapters import ALL_LINEAR, CONFIG, PREFIX, WEIGHTS, Adapter, is_adapter, settings_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.converted import made_once, state_of
from estune.weights.locate import companions, hub_name, is_copied, is_here, locate, pinned
from estune.weights.parameters import layer_of
from estune.weights.quantized import matrix_shapes, quantized_by


def open_checkpoint(model: str | Path, adapter: Adapter | None = None) -> Checkpoint:
    """The checkpoint that training begins at: the model's or, with settings of an adapter, that adapter's over it.

    Args:
        model: as `locate` takes it.
        adapter: made once, in the user's cache.

    Raises:
        EstuneError: there is no such model or adapter, or the model has no such modules.
    """
    if adapter is None:
        return Checkpoint(locate(model))
    base = locate(model)
    if is_adapter(base):
        raise EstuneError(
            f"model {model} is an adapter itself, which is trained on if `adapter` is left out; or give its base model "
            f"as model and adapter.path={base}"
        )
    given = [] if adapter.path is None else _files_of(adapter.path)
    stated = state_of([*base.glob("*.safetensors"), *companions(base), *given])
    place = _place(str(model), base)
    told = [stated, place, adapter.model_dump_json()]
    copy = user_cache("adapters") / blake2b(repr(told).encode(), digest_size=12).hexdigest()

    def make(folder: Path) -> None:
        folder.mkdir()
        for file in companions(base):
            if file.name != "config.json":
                shutil.copy(file, folder / file.name)
        settings = settings_of(adapter.path) if adapter.path else _new(adapter, Checkpoint(base), folder / WEIGHTS)
        if adapter.path is not None:
            shutil.copy(adapter.path / WEIGHTS, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({**settings, **place, "inference_mode": True}, indent=2) + "\n")

    return Checkpoint(made_once(copy, make, f"model {model}: making the adapter to begin with"))


def adapted_shapes(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter) -> dict[str, tuple[int, int]]:
    """The modules that a new adapter is for, each with its outputs and inputs.

    Args:
        shapes: of a checkpoint's tensors, by name.
        adapter: its settings.

    Raises:
        EstuneError: a target is no matrix of the model.
    """
    matrices = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and layer_of(name)[0].isdigit()
    }
    if adapter.target == [ALL_LINEAR]:
        return matrices
    found = {m: s for m, s in matrices.items() if any(f".{m}".endswith(f".{target}") for target in adapter.target)}
    missing = next((t for t in adapter.target if not any(f".{m}".endswith(f".{t}") for m in found)), None)
    if missing is not None:
        known = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in matrices))
        raise EstuneError(f"adapter.target: no matrix of the layers is called {missing!r}; give some of: {known}")
    return found


def adapter_elements(shapes: Mapping[str, tuple[int, ...]], adapter: Adapter) -> int:
    """Elements of all tensors of an adapter, new or given; arguments as of `adapted_shapes`."""
    if adapter.path is not None:
        _files_of(adapter.path)
        return sum(tensor.elements for tensor in Checkpoint(adapter.path).tensors.values())
    return sum(adapter.rank * sum(shape) for shape in adapted_shapes(shapes, adapter).values())


def _new(adapter: Adapter, base: Checkpoint, file: Path) -> dict[str, Any]:
    """Write a new adapter's tensors; return its settings."""
    from safetensors.numpy import save_file

    if quantized_by(base.path) is None:
        shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    else:
        shapes = matrix_shapes(base.path)
    modules = adapted_shapes(shapes, adapter)
    save_file(dict(_drawn(adapter, modules)), file, {"format": "pt"})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(modules, adapted_shapes(shapes, Adapter())),
    }


def _targets(modules: Collection[str], matrices: Collection[str]) -> list[str]:
    """The modules as PEFT is told them: by the ends of their names, where these fit no other matrix, else in full."""
    ends = {module.rpartition(".")[2] for module in modules}
    unique = all(matrix in modules for matrix in matrices if matrix.rpartition(".")[2] in ends)
    return sorted(ends if unique else modules)


def _drawn(adapter: Adapter, modules: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """The tensors of a new adapter: A of the spread that PEFT's uniform one has, 1 / sqrt(3 * inputs), and B zero."""
    from estune.noise import cpu_draw
    from estune.noise.reference import tensor_id

    for module, (outputs, inputs) in modules.items():
        name = f"{PREFIX}{module}.lora_A.weight"
        drawn = cpu_draw.normal(adapter.seed, tensor_id(name), 0, adapter.rank * inputs)
        scale = np.float32(1 / np.sqrt(3 * inputs))
        yield name, (drawn * scale).reshape(adapter.rank, inputs)
        yield f"{PREFIX}{module}.lora_B.weight", np.zeros((outputs, adapter.rank), np.float32)


def _files_of(folder: Path) -> list[Path]:
    """The files of an adapter that is given."""
    if not is_adapter(folder):
        raise EstuneError(f"adapter.path {folder} holds no {CONFIG} with {WEIGHTS}: give an adapter that PEFT saved")
    return [folder / CONFIG, folder / WEIGHTS]


def _place(model: str, base: Path) -> dict[str, str | None]:
    """Where the model under an adapter lies, as PEFT takes it: a hub id with its commit, or a directory.

    Of a directory that is not the user's the revision is the name that the model has here, which other machines know.
    """
    known = pinned(model)
    name, revision = hub_name(known)
    if revision and not is_here(model):
        return {"base_model_name_or_path": name, "revision": revision}
    return {"base_model_name_or_path": str(base.resolve()), "revision": known if is_copied(known) else None}

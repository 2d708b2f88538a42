"""What is trained: parameters of the checkpoint, and where in the model's tensors each one lies."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from estune.errors import EstuneError
from estune.noise.rows import Rows
from estune.weights.adapters import PREFIX

if TYPE_CHECKING:
    from torch import Tensor, nn


ADAPTER = "adapter"
"""What PEFT calls the adapter in a model: part of the names of its parameters there, and not in its files."""

_IN_LAYER = re.compile(r"(?:^|.*\.)(?:layers|layer|blocks|block|h)\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Part of a checkpoint tensor of `pitch` columns: `rows` rows of `width` elements, from (`row`, `column`) on.

    Of more than two dimensions the last counts columns and all others rows; with one dimension every element is a row.
    """

    row: int
    column: int
    rows: int
    width: int
    pitch: int

    @property
    def start(self) -> int:
        """Row-major position of its first element in the tensor."""
        return self.row * self.pitch + self.column

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.rows * self.width

    @property
    def layout(self) -> Rows | None:
        """Where its rows lie; None if it is one stretch of the tensor."""
        return None if self.width == self.pitch or self.rows == 1 else Rows(self.width, self.pitch)


@dataclass(frozen=True)
class Parameter:
    """A trained tensor of a model: the checkpoint tensor `name`, whole and row-major, or a rectangle of it.

    `aliases` are further names under which the checkpoint stores the same (tied) tensor. `counted` is False for a
    rectangle that another process holds too, and counts: each element is in the fingerprint once.
    """

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()
    rectangle: Rectangle | None = None
    counted: bool = True

    @property
    def part(self) -> Rectangle:
        """The part of the checkpoint tensor that this is."""
        if self.rectangle is not None:
            return self.rectangle
        columns = self.tensor.shape[-1] if self.tensor.ndim > 1 else 1
        return Rectangle(0, 0, self.tensor.numel() // max(columns, 1), columns, columns)


def own_parameters(module: nn.Module) -> list[Parameter]:
    """All parameters of any module under its own names, tied tensors once."""
    tied: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        tied.setdefault(tensor.data_ptr(), (tensor, []))[1].append(name)
    return [Parameter(names[0], tensor, tuple(names[1:])) for tensor, names in tied.values()]


def trained_parameters(model: nn.Module, names: Collection[str], pattern: str = "*") -> list[Parameter]:
    """The model's parameters under the names that they have in the checkpoint; tied tensors come once.

    Of a model with an adapter these are the adapter's: the checkpoint holds no others.

    Args:
        model: a transformers model.
        names: the tensors of its checkpoint.
        pattern: shell-style pattern of the names to train.

    Raises:
        EstuneError: where a parameter is not one tensor of the checkpoint, or the pattern fits none.
    """
    adapted = hasattr(model, "peft_config")
    checkpoint_names = adapter_names(model) if adapted else _checkpoint_names(model, names)
    by_storage: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if adapted and name not in checkpoint_names:
            continue
        found = checkpoint_names.get(name)
        stored = by_storage.setdefault(tensor.data_ptr(), (tensor, []))[1]
        if found is not None and found not in stored:
            stored.append(found)
    missing = [n for n, t in model.named_parameters() if not by_storage.get(t.data_ptr(), (t, [n]))[1]]
    if missing:
        raise EstuneError(
            f"{len(missing)} parameters are not tensors of the checkpoint, the first is {missing[0]}: "
            "architectures that merge tensors on loading are not supported yet"
        )
    chosen = [
        Parameter(stored[0], tensor, tuple(stored[1:]))
        for tensor, stored in by_storage.values()
        if fnmatchcase(stored[0], pattern)
    ]
    if not chosen:
        raise EstuneError(f"no parameter's name fits the pattern {pattern!r}; names look like {next(iter(names))}")
    return chosen


def layer_of(name: str) -> tuple[str, str]:
    """Of a checkpoint's tensor its layer (a number, or the tensor's own name outside of layers) and its kind there."""
    name = name.removesuffix(".weight")
    if found := _IN_LAYER.fullmatch(name):
        return found[1], re.sub(r"\.\d+(?=\.)", "", found[2])
    return name.removeprefix("model."), ""


def adapter_names(model: nn.Module) -> dict[str, str]:
    """The name in PEFT's files of each parameter of an adapter in a model."""
    own = (name for name, _ in model.named_parameters() if f".{ADAPTER}" in name)
    return {name: PREFIX + name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", "") for name in own}


def _checkpoint_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """The checkpoint's name of each parameter that is one of its tensors, as it is.

    transformers renames some tensors on loading, and makes others of several tensors, or in another order of elements.
    Its conversion mapping (`transformers.conversion_mapping`) says which; only renamed ones are followed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, list[str]] = {}
    for name in sorted(names):  # the order in which transformers renames, and some of its renamings depend on
        target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if converted is None and target in parameters:
            sources.setdefault(target, []).append(name)
    return {
        target: target if target in found else found[0]
        for target, found in sources.items()
        if target in found or len(found) == 1
    }

"""What is trained: parameters of the checkpoint, and where in the model's tensors each one lies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from estune.errors import EstuneError
from estune.noise.rows import Rows
from estune.weights.adapters import PREFIX

if TYPE_CHECKING:
    from torch import Tensor, nn


AUTO = "auto"
"""The pattern of all parameters of a language model, and of a vision-language model's language model."""
ADAPTER = "adapter"
"""What PEFT calls the adapter in a model: part of the names of its parameters there, and not in its files."""

_SENSES = {
    *("vqmodel", "image_encoder", "visual_projection", "img_temporal_embedding"),  # of Chameleon and GIT
    *("vision_model", "perceiver_resampler", "embed_tokens_extend"),  # of IDEFICS and Phi-4
}
"""Parts for pictures and sound that some models have in the midst of their decoder."""
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
    rectangle that another process holds too, and counts: each element is in the fingerprint once. `columns` are those
    of the checkpoint tensor, where the pitch of the rectangle is another number, as of every second row.
    """

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()
    rectangle: Rectangle | None = None
    counted: bool = True
    columns: int | None = None

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


def trained_parameters(model: nn.Module, tensors: Mapping[str, Any], pattern: str = "*") -> list[Parameter]:
    """What the model's parameters hold of each checkpoint tensor: all of it, or rectangles; tied tensors come once.

    The memory of a parameter whose dimensions the checkpoint has in another order is laid out anew.

    Of a model with an adapter these are the adapter's: the checkpoint holds no others.

    Args:
        model: a transformers model.
        tensors: those of its checkpoint by name, of which the shapes are read.
        pattern: which of them to train, as `fits` takes it.

    Raises:
        EstuneError: where parameters are not tensors of the checkpoint, nor parts of them, or the pattern fits none.
    """
    from estune.weights.merged import merged_tensors

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    adapted = hasattr(model, "peft_config")
    plain, groups = (adapter_names(model), {}) if adapted else _checkpoint_names(model, shapes)
    by_storage: dict[int, tuple[str, Tensor, list[str]]] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        found = plain.get(name)
        if adapted and found is None:
            continue
        stored = by_storage.setdefault(own.data_ptr(), (name, own, []))[2]
        if found is not None and found not in stored:
            stored.append(found)
    merged = merged_tensors(model, groups, shapes) if groups else {}
    parameters: list[Parameter] = []
    language = _language_part(model)
    spoken: set[str] = set()
    for name, tensor, stored in by_storage.values():
        before = len(parameters)
        if stored:
            parameters.append(Parameter(stored[0], tensor, tuple(stored[1:])))
        elif name in merged and merged[name].elements == tensor.numel():
            flat = merged[name].lay_out(tensor)
            for piece in merged[name].pieces:
                held = flat[piece.start : piece.start + piece.part.elements]
                columns = shapes[piece.name][-1] if len(shapes[piece.name]) > 1 else 1
                parameters.append(Parameter(piece.name, held, (), piece.part, columns=columns))
        else:
            raise EstuneError(
                f"the model's parameter {name} is not made of the checkpoint's tensors as they are: it cannot be "
                "trained"
            )
        if language is None or id(tensor) in language:
            spoken.update(p.name for p in parameters[before:])
    _check_whole(parameters, shapes)
    refuse_unfitting(pattern, shapes)
    chosen = [p for p in parameters if fits(p.name, pattern, spoken=p.name in spoken)]
    if not chosen:
        raise EstuneError(f"train_parameters: {pattern} leaves no parameter to train")
    return chosen


def sees(config: Any) -> bool:
    """Whether a model has a part for pictures, which encodes them or finds codes for them, by its configuration."""
    return hasattr(config, "vision_config") or hasattr(config, "vq_config")


def language_names(model: Any, names: Collection[str]) -> set[str]:
    """Those of a checkpoint's names that fit `auto`: of a vision-language model its language model's, else all.

    Args:
        model: a transformers model, whose parameters may be on `meta`.
        names: of the tensors of its checkpoint.
    """
    language = _language_part(model)
    if language is None:
        return set(names)
    plain, groups = _checkpoint_names(model, names)
    sources = {**{target: [name] for target, name in plain.items()}, **groups}
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name for target, stored in sources.items() if id(own[target]) in language for name in stored}


def fits(name: str, pattern: str, *, spoken: bool = True) -> bool:
    """Whether a checkpoint's tensor is to be trained.

    Args:
        name: the tensor's.
        pattern: one or more shell-style patterns with commas between them. The tensors that fit any of them are
            trained, but for those that fit one that begins with `!`. If all do, it is all tensors but those.
        spoken: whether the tensor fits `auto`, which stands for a language model's tensors: of a vision-language model
            names alone do not tell.
    """
    wanted, left_out = _parts(pattern)
    return any(spoken if part == AUTO else fnmatchcase(name, part) for part in wanted or ["*"]) and not any(
        fnmatchcase(name, part) for part in left_out
    )


def refuse_unfitting(pattern: str, names: Collection[str]) -> None:
    """Refuse patterns one of which fits no name of a checkpoint's tensors, or that leave none.

    Raises:
        EstuneError: naming it.
    """
    wanted, left_out = _parts(pattern)
    for part in [*wanted, *left_out]:
        if part != AUTO and not any(fnmatchcase(name, part) for name in names):
            raise EstuneError(
                f"train_parameters: no parameter's name fits the pattern {part!r}; names look like {next(iter(names))}"
            )
    if not any(fits(name, pattern) for name in names):
        raise EstuneError(f"train_parameters: {pattern} leaves no parameter to train")


def _parts(pattern: str) -> tuple[list[str], list[str]]:
    """The patterns of what is trained, and of what is left out of that."""
    parts = [part.strip() for part in pattern.split(",")]
    return [p for p in parts if not p.startswith("!")], [p[1:].strip() for p in parts if p.startswith("!")]


def _language_part(model: Any) -> set[int] | None:
    """Which parameters of a vision-language model are its language model's, by `id`; None for other models."""
    if not sees(model.config):
        return None
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    modules = [
        *(part for name, part in decoder.named_children() if name not in _SENSES),
        *([head] if head is not None else []),
    ]
    spoken = {id(parameter) for module in modules for parameter in module.parameters()}
    return spoken.union(map(id, decoder.parameters(recurse=False)))


def _check_whole(parameters: Sequence[Parameter], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that of each checkpoint tensor that is held in pieces the whole is."""
    held: Counter[str] = Counter()
    for p in parameters:
        held[p.name] += p.tensor.numel()
    for name, elements in held.items():
        if elements != math.prod(shapes[name]):
            raise EstuneError(
                f"of {math.prod(shapes[name]):,} elements of {name} the model holds {elements:,}: it cannot be trained"
            )


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


def _checkpoint_names(model: Any, names: Collection[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The checkpoint's name of each parameter that is one of its tensors, as it is; and what transformers converts.

    transformers renames some tensors on loading, and makes others of several tensors, or in another order of elements.
    Its conversion mapping (`transformers.conversion_mapping`) says which.

    Returns:
        The checkpoint's names by the model's; and the groups of names that are converted together, in the order in
        which they are, by the first of the model's tensors that are made of them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):  # transformers' order, which some rules count on
        target, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:  # saved under the model's own names
            target, converted = name, None
        if target in parameters:
            (sources if converted is None else groups).setdefault(target, []).append(name)
    plain = {
        target: target if target in found else found[0]
        for target, found in sources.items()
        if target in found or len(found) == 1
    }
    return plain, groups

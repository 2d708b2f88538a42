"""Members of low-rank noise in one batch of any model's own forward, over the weights that they have in common.

As `cpu/members.py` does it for the fused kernels: a member's matrix is W + a b^T, of a higher rank with as many such
products, so that what it gives is the common product plus (x . b) a, and the large product is computed for the rows of
all members at once. While a batch is decoded, the modules that hold trained parameters add to what they compute, by
row; nothing of the model itself is changed. Served are linear layers, tables of embeddings and norms, and a trial
forward tells whether the model calls them with a row of the batch as the first dimension. Where not all that is trained
is reached so, members are decoded one by one.

All vectors are in one tensor that stays where it is, and so are the rows' owners, so that a captured graph serves any
members. What is not promised is bits: a matrix library may sum up a row in another order beside more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from estune.engines.cpu.members import Drawn
from estune.engines.vectors import Stack, Vectors, of_columns, of_rows
from estune.es.strategy import Member

TRIAL = (2, 3)
"""Rows and tokens of the trial."""


@dataclass
class Rows:
    """Whose the rows of the forward at hand are, `[rows]`, for the modules that ask."""

    owners: Tensor


@dataclass(frozen=True)
class RowMembers:
    """Members that share a batch.

    Attributes:
        count: how many they are.
        owners: `[rows]`, the member whose weights decode each row of the batch.
        rows: where modules look for the owners of the rows of a forward.
        together: what has drawn them.
    """

    count: int
    owners: Tensor
    rows: Rows
    together: RowsTogether

    def with_owners(self, owners: npt.NDArray[np.int64]) -> RowMembers:
        """The same members for other rows."""
        return replace(self, owners=torch.from_numpy(owners.astype(np.int64)).to(self.owners.device))


@dataclass
class _Served:
    """A module with trained parameters, by the parameters' names."""

    module: nn.Module
    parameters: dict[str, Drawn]
    vectors: dict[str, Stack] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)  # each `[members, rank, elements]`

    def __post_init__(self) -> None:
        for name, drawn in self.parameters.items():
            self.vectors[name] = of_rows(drawn)
            if len(drawn.shape) == 2:
                self.vectors[name + ".b"] = of_columns(drawn)

    def of(self, name: str, owners: Tensor) -> Tensor | None:
        """Vectors by row, `[rows, rank, elements]`; None where they are not trained."""
        view = self.views.get(name)
        return None if view is None else view.index_select(0, owners)


class RowsTogether:
    """Draws members of low-rank noise for a model whose forward decodes them together.

    Args:
        model: a transformers causal language model.
        tensors: what members perturb, by the address of its memory.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[int, Drawn]) -> None:
        self.served = list(_served(model, tensors))
        self._device: torch.device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._vectors = Vectors((d for one in self.served for d in one.parameters.values()), self._device)
        self.size = self._vectors.size
        self.storage = torch.zeros(0, self.size, dtype=self._dtype, device=self._device)
        self._rows = Rows(torch.zeros(0, dtype=torch.int64, device=self._device))

    @property
    def member_bytes(self) -> int:
        """Bytes of a member's vectors."""
        return self.size * self.storage.element_size()

    def of(self, members: Sequence[Member], sigma: float) -> RowMembers:
        """What these members add, perturbed by `sigma`; of no row yet. It takes the place of the last members."""
        if len(members) > len(self.storage):
            self.storage = torch.zeros(len(members), self.size, dtype=self._dtype, device=self._device)
            self._show()
        for row, member in zip(self.storage, members, strict=False):
            row.copy_(self._vectors.draw(member, sigma))
        return RowMembers(len(members), self._rows.owners, self._rows, self)

    def _show(self) -> None:
        """Let the modules see the vectors where they are now."""
        for one in self.served:
            one.views = {name: self._vectors.part(self.storage, stack) for name, stack in one.vectors.items()}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within this, the model's modules add what the members do whose the rows are."""
        for one in self.served:
            one.module.forward = _wrapped(one, self._rows)
        try:
            yield
        finally:
            for one in self.served:
                del one.module.forward

    @torch.inference_mode()
    def unserved(self, model: nn.Module, tensors: Mapping[int, Drawn]) -> str | None:
        """What keeps members from being decoded together, or None; it tries a forward of two rows."""
        served = {id(one.module) for one in self.served}
        held = {p.data_ptr() for one in self.served for name, p in _own(one.module) if name in one.parameters}
        for name, parameter in model.named_parameters():
            if parameter.data_ptr() in tensors and parameter.data_ptr() not in held:
                return f"{name} is no part of a linear layer, a table of embeddings or a norm"
        trained = {p.data_ptr(): p.dtype for p in model.parameters() if p.data_ptr() in tensors}
        if len(trained) < len(tensors):
            return "the model holds some of its tensors in parts"
        if set(trained.values()) != {self._dtype}:
            return "its tensors are of several types"
        rows, tokens = TRIAL
        seen: set[int] = set()
        strange: list[str] = []

        def look(module: nn.Module, arguments: Any, options: Any) -> None:
            given = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
            seen.add(id(module))
            plain = len(given) == 1 and len(arguments) == 1
            if not plain or not _by_row(module, given[0], rows):
                strange.append(type(module).__name__)

        hooks = [one.module.register_forward_pre_hook(look, with_kwargs=True) for one in self.served]
        try:
            model(torch.zeros(rows, tokens, dtype=torch.int64, device=self._device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if strange:
            return f"the model calls a {strange[0]} with something else than rows of the batch"
        if seen != served:
            return "the model takes weights from a layer without calling it"
        return None


_Kind = Callable[[_Served, Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
"""A module's output for an input, by row: of the module, its own forward, the input and the owners of the rows."""
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def rows_together(model: nn.Module, tensors: Mapping[int, Drawn]) -> RowsTogether | str:
    """What draws members that a model's own forward decodes together, or why it cannot."""
    together = RowsTogether(model, tensors)
    return together.unserved(model, tensors) or together


def _served(model: nn.Module, tensors: Mapping[int, Drawn]) -> Iterator[_Served]:
    """The modules that can add to what they compute, of those that hold trained parameters."""
    for module in model.modules():
        held = {name: p for name, p in _own(module) if p.data_ptr() in tensors}
        own = {name: tensors[p.data_ptr()] for name, p in held.items()}
        if own and _kind(module) is not None and all(tuple(held[name].shape) == own[name].shape for name in own):
            yield _Served(module, own)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _kind(module: nn.Module) -> _Kind | None:
    """How a module of this kind adds; None for one of which that is not known."""
    if type(module) is nn.Linear:
        return _linear
    if type(module) is Conv1D:
        return _turned
    if isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or hasattr(module, "embed_scale")):
        return _embedding
    if isinstance(module, _NORMS) and type(module) not in _NORMS:  # it may call PyTorch's own, which takes one weight
        return None
    flat = all(parameter.ndim == 1 for _, parameter in _own(module))
    if flat and not any(module.children()) and type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
        return _norm
    return None


def _by_row(module: nn.Module, x: Tensor, rows: int) -> bool:
    """Whether a module's input has the rows of the batch as its first dimension, as its kind wants it."""
    if isinstance(module, nn.Embedding):  # positions can be the same for all rows
        return x.ndim == 2 and x.shape[0] in (1, rows)
    return x.shape[0] == rows and (x.ndim == 3 or (x.ndim > 3 and _kind(module) is _norm))


def _wrapped(one: _Served, rows: Rows) -> Callable[[Tensor], Tensor]:
    original = one.module.forward
    kind = _kind(one.module)
    assert kind is not None
    return lambda x: kind(one, original, x, rows.owners)


def _linear(one: _Served, original: Callable[[Tensor], Tensor], x: Tensor, owners: Tensor) -> Tensor:
    return _product(original(x), x, one.of("weight.b", owners), one.of("weight", owners), one.of("bias", owners))


def _turned(one: _Served, original: Callable[[Tensor], Tensor], x: Tensor, owners: Tensor) -> Tensor:
    """Of a matrix that is stored as its transpose."""
    return _product(original(x), x, one.of("weight", owners), one.of("weight.b", owners), one.of("bias", owners))


def _product(out: Tensor, x: Tensor, into: Tensor | None, out_of: Tensor | None, bias: Tensor | None) -> Tensor:
    """Add (x . into) out_of and a bias to a product `[rows, tokens, columns]`; the vectors are by row."""
    if into is not None and out_of is not None:
        out = _add(out, torch.bmm(x, into.transpose(1, 2)), out_of)
    return out if bias is None else out + bias


def _add(out: Tensor, low: Tensor, out_of: Tensor) -> Tensor:
    """`out` `[rows, tokens, columns]` and the product of `low` `[rows, tokens, rank]` and `out_of`, in one pass."""
    return out.addcmul(low, out_of) if low.shape[-1] == 1 else torch.baddbmm(out, low, out_of)


def _embedding(one: _Served, original: Callable[[Tensor], Tensor], x: Tensor, owners: Tensor) -> Tensor:
    a = one.views["weight"][owners[:, None], :, x]
    b = one.views["weight.b"].index_select(0, owners)
    return _add(original(x), a, b * getattr(one.module, "embed_scale", 1.0))


def _norm(one: _Served, original: Callable[[Tensor], Tensor], x: Tensor, owners: Tensor) -> Tensor:
    """A norm by weights of each row: PyTorch's own is computed without any, others take them in place of theirs."""
    module: Any = one.module
    own = {}
    for name, parameter in _own(module):
        added = one.of(name, owners)
        own[name] = parameter if added is None else (parameter + added).view(len(x), *[1] * (x.ndim - 2), -1)
    if isinstance(module, _NORMS):
        if isinstance(module, nn.LayerNorm):
            plain = functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        else:
            plain = functional.rms_norm(x, module.normalized_shape, None, module.eps)
        plain = plain * own["weight"] if "weight" in own else plain
        return plain + own["bias"] if "bias" in own else plain
    before = dict(module._parameters)
    module._parameters.update(own)
    try:
        return original(x)
    finally:
        module._parameters.update(before)

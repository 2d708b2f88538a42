"""What members in slots add where vLLM's LoRA has no layers: to tables of embeddings, heads, biases and norms.

Each module that is served has the vectors of all members beside it, and adds to what it computes what the member adds
whose the row is; a row without a slot is left as it is, to the bit. A row of a table W + a b^T is that of W and
a[token] b, and the logits of such a head are those of W and (h . b) a; noise of vectors is added up for each member.

These are plain operations on tensors that stay where they are, and modules are changed before vLLM compiles the model
or captures CUDA graphs. vLLM is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from estune.engines.vllm import lora
from estune.engines.vllm.parameter_map import Place
from estune.errors import EstuneError

_RANK = "estune_rank"  # what workers are told in vLLM's `additional_config`
Plain = Callable[[Tensor], Tensor]
"""A norm without weights."""


def options(rank: int) -> dict[str, Any]:
    """What vLLM is told, as `vllm.LLM` takes it, to serve members of that rank by more than LoRA layers."""
    return {"additional_config": {_RANK: rank}}


def serve_when_told() -> None:
    """Have workers, when they have made their LoRA layers, serve members by other modules too, if they are told so."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model

    def load_and_serve(self: Any, model: nn.Module, vllm_config: Any, *args: Any) -> nn.Module:
        made: nn.Module = load(self, model, vllm_config, *args)
        rank = vllm_config.additional_config.get(_RANK)
        if rank is not None:
            lora_config = vllm_config.lora_config
            shared = lora.wrapper(self)
            self.estune_additions = Additions(made, shared, lora_config.max_loras, rank, lora_config.lora_dtype)
        return made

    LoRAModelRunnerMixin.load_lora_model = load_and_serve


@dataclass(frozen=True)
class Stacks:
    """What all members add to one of vLLM's tensors; the last of each is zero, for rows without a slot.

    Attributes:
        rows: of a table's noise the vectors a, `[slots + 1, 1, rank, rows]`; or noise of a vector, with one for `rank`.
        columns: of a table's noise the vectors b, `[slots + 1, 1, rank, columns]`.
    """

    rows: Tensor
    columns: Tensor | None = None


class Rows:
    """Whose the rows are of the forward at hand.

    Args:
        wrapper: vLLM's, which is told the slot of each row.
        slots: how many there are.
    """

    def __init__(self, wrapper: Any, slots: int) -> None:
        self._wrapper = wrapper
        self._numbers = torch.arange(slots + 1, device=wrapper.device)
        wrapper._token_lora_indices.fill_(-1)  # rows that fill up a captured graph

    def of(self, x: Tensor) -> Tensor:
        """The slot of each row of `x` `[rows, ...]`, one a token of the batch; the one beyond the last is none.

        Raises:
            EstuneError: it has fewer rows than there are tokens.
        """
        if not torch.compiler.is_compiling() and len(x) < (self._wrapper.indices_len[0] or 0):
            raise EstuneError(f"vLLM gives a module {tuple(x.shape)}, which has no row for each token")
        found: Tensor = self._wrapper._token_lora_indices[: x.shape[0]]
        return found % len(self._numbers)  # vLLM's -1 is none

    def sampled(self, x: Tensor) -> Tensor | None:
        """As `of`, for hidden states that tokens are sampled by. None for those of a prompt that the base scores."""
        found: Tensor = self._wrapper.sampler_indices
        return found % len(self._numbers) if len(found) == len(x) else None

    def own(self, low: Tensor, slots: Tensor) -> Tensor:
        """Of `low` `[rows, 1 or all slots, rank]` what is of each row's own slot, `[rows, all slots * rank]`."""
        return torch.where((slots[:, None] == self._numbers)[:, :, None], low, 0).flatten(1)


class _Linear:
    """A linear layer, of whose bias members add noise. What calls its weights is vLLM's `quant_method`."""

    def __init__(self, layer: Any, rows: Rows, bias: Stacks) -> None:
        self._rows = rows
        self._bias = bias.rows[:, 0, 0]
        self._apply = layer.quant_method.apply
        layer.quant_method.apply = self.apply

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's product, `[rows, outputs]`."""
        out: Tensor = self._apply(layer, x, bias)
        return out if bias is None else out + self._bias.index_select(0, self._rows.of(x))


class _Table:
    """A table of embeddings, a head, or what is both; a head may have a bias. It is called as a linear layer is."""

    def __init__(self, layer: Any, rows: Rows, weight: Stacks, bias: Stacks | None) -> None:
        assert weight.columns is not None
        self._rows = rows
        self._a = weight.rows[:, 0]
        self._b = weight.columns.flatten(0, 2)
        self._bias = None if bias is None else bias.rows[:, 0, 0]
        method = layer.quant_method
        self._embedding = method.embedding
        method.embedding = self.embedding
        self._apply = method.apply
        method.apply = self.apply
        layer.use_fused_embedding = False  # which would not call it

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """The embeddings `[tokens, hidden]` of tokens `[tokens]`."""
        out: Tensor = self._embedding(layer, ids)
        slots = self._rows.of(ids)
        a = self._a[slots, :, ids]
        return torch.addmm(out, self._rows.own(a[:, None], slots), self._b)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits `[rows, tokens of the vocabulary]` of hidden states."""
        out: Tensor = self._apply(layer, x, bias)
        slots = self._rows.sampled(x)
        if slots is None:
            return out
        if bias is not None and self._bias is not None:
            out = out + self._bias.index_select(0, slots)
        low = (x @ self._b.T).view(len(x), len(self._a), -1)
        return out.addmm_(self._rows.own(low, slots), self._a.flatten(0, 1))


class _Norm:
    """A norm, after which weights are multiplied and biases added."""

    def __init__(self, norm: Any, rows: Rows, plain: Plain, weight: Stacks, bias: Stacks | None) -> None:
        self._rows = rows
        self._plain = plain
        self._weight = weight.rows[:, 0, 0]
        self._bias = None if bias is None else bias.rows[:, 0, 0]
        self._forward = norm.forward
        norm.forward = self.forward

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As vLLM's: of `x` `[tokens, ..., elements]` or, if there is a residual, of the sum, which is returned too."""
        if residual is None:
            return self._added(self._forward(x), x)
        out, total = self._forward(x, residual)
        return self._added(out, total), total

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        slots = self._rows.of(x)
        shape = len(x), *[1] * (x.ndim - 2), -1
        out = out.addcmul(self._plain(x), self._weight.index_select(0, slots).view(shape))
        return out if self._bias is None else out + self._bias.index_select(0, slots).view(shape)


class Additions:
    """The modules of one worker that serve members in slots beside the LoRA layers.

    Args:
        model: vLLM's, with its LoRA layers.
        wrapper: which is told the slot of each row.
        slots: how many there are.
        rank: of the noise of matrices.
        dtype: the model's.
    """

    def __init__(self, model: nn.Module, wrapper: Any, slots: int, rank: int, dtype: torch.dtype) -> None:
        self._slots = slots
        self._rank = rank
        self._dtype = dtype
        self.stacks: dict[int, Stacks] = {}
        """By the address of vLLM's tensor: a tied head has the table's."""
        rows = Rows(wrapper, slots)
        for module in model.modules():
            self._serve(module, rows)

    def places(self, place: Place, live: Tensor, rows: Tensor, columns: Tensor | None) -> list[lora.Place]:
        """Where a member's vectors go that are of a part of a checkpoint's tensor.

        Args:
            place: of the part, in vLLM's tensor.
            live: that tensor.
            rows: `[rank, rows]` of the checkpoint's tensor; or of a vector `[1, elements]`.
            columns: `[rank, columns]`; None for a vector.

        Raises:
            EstuneError: no module serves it.
        """
        stacks = self.stacks.get(live.data_ptr())
        part = place.part
        whole = columns is None or (part.column == 0 and part.width == columns.shape[1])
        if stacks is None or not whole:
            raise EstuneError(f"vLLM has no slots for {place.name}")
        stretch = stacks.rows[..., place.row : place.row + part.rows]
        found = [lora.Place(stretch, rows[:, part.row : part.row + part.rows], 1.0)]
        if columns is not None:
            assert stacks.columns is not None
            found.append(lora.Place(stacks.columns, columns, 1.0))
        return found

    def _serve(self, module: Any, rows: Rows) -> None:
        """Have a module add what members do, if it is of a kind that is known."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        method = type(getattr(module, "quant_method", None))
        bias = getattr(module, "bias", None)
        if isinstance(module, VocabParallelEmbedding) and method is UnquantizedEmbeddingMethod:
            _Table(module, rows, self._stacks_of(module.weight), None if bias is None else self._stacks_of(bias))
        elif isinstance(module, LinearBase) and method is UnquantizedLinearMethod:
            if bias is not None and not module.skip_bias_add:
                _Linear(module, rows, self._stacks_of(bias))
        elif (plain := _plain(module)) is not None:
            _Norm(module, rows, plain, self._stacks_of(module.weight), None if bias is None else self._stacks_of(bias))

    def _stacks_of(self, parameter: Tensor) -> Stacks:
        found = self.stacks.get(parameter.data_ptr())
        if found is None:
            rank = self._rank if parameter.ndim == 2 else 1
            rows, *columns = (
                torch.zeros(self._slots + 1, 1, rank, size, dtype=self._dtype, device=parameter.device)
                for size in parameter.shape
            )
            found = self.stacks[parameter.data_ptr()] = Stacks(rows, *columns)
        return found


def _plain(module: Any) -> Plain | None:
    """What a norm computes without weights; None for modules that are none, or of an unknown kind."""
    from vllm.model_executor.layers import layernorm

    kind = type(module)
    if kind is layernorm.GemmaRMSNorm or (
        kind is layernorm.RMSNorm and module.has_weight and module.variance_size_override is None
    ):
        size, eps = module.weight.shape, module.variance_epsilon
        return lambda x: functional.rms_norm(x, size, None, eps)
    if kind in (nn.LayerNorm, getattr(layernorm, "LayerNorm", None)) and module.weight is not None:
        size, eps = module.weight.shape, module.eps
        return lambda x: functional.layer_norm(x, size, None, None, eps)
    return None

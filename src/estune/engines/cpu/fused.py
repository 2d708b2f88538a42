"""Decoding on a CPU with as few operations a token as a decoder layer allows: four matrix products and five kernels.

For the models that share Llama's layer (Llama, Mistral, Qwen2, Qwen3), in float32 and bfloat16; the others are decoded
over their own forward, by `decode.Decoder`. Besides its kernels: projections of the same input are one product, what
prompts begin with in common is computed once, nothing is padded, rows that have ended are left out, and of a prompt's
last layer only the last token is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from estune.completion import Sampling
from estune.engines import decode
from estune.engines.cpu import kernels
from estune.engines.cpu.simd import WIDTH
from estune.engines.memory import aligned_empty, memory_for
from estune.engines.sampling import choose
from estune.engines.tree import Places, PromptTree, common_prefix

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
PREFILL_TOKENS = decode.PREFILL_TOKENS["cpu"]
HEAD_ROWS = 8192
"""Tokens of the vocabulary whose logits are computed at once, and forgotten but for the largest."""

_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # those whose angles do not depend on the length of a batch
Array = npt.NDArray[Any]


def unfusable(model: Any) -> str | None:
    """Why `FusedDecoder` cannot serve `model`, or None."""
    config = model.config
    if type(model).__name__ not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        return "its layers may differ from Llama's"
    attention = model.model.layers[0].self_attn
    window = getattr(config, "sliding_window", None)
    widths = (config.hidden_size, config.intermediate_size, attention.head_dim // 2)
    reasons = {
        "it is not on a CPU": model.device.type != "cpu",
        "its type is neither float32 nor bfloat16": model.dtype not in (torch.float32, torch.bfloat16),
        f"its activation is {config.hidden_act}": config.hidden_act != "silu",
        "its rotary embedding depends on the length": model.model.rotary_emb.rope_type not in _FIXED_ROPES,
        "it looks back over a window": window is not None and window < config.max_position_embeddings,
        f"its widths are no multiples of {WIDTH}": any(width % WIDTH for width in widths),
        "its vocabulary is smaller than a vector": config.vocab_size < WIDTH,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, views of the model's own."""

    input_norm: Array
    qkv: torch.Tensor  # [(heads + 2 * key heads) * dim, hidden]
    qkv_bias: torch.Tensor | None
    query_norm: Array  # [dim], or empty
    key_norm: Array
    output: torch.Tensor  # [hidden, heads * dim]
    output_bias: torch.Tensor | None
    mlp_norm: Array
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class _Cache:
    """Keys `[layers, rows, heads, slots / 16, dim, 16]` and values `[layers, rows, heads, slots, dim]`."""

    keys: Array
    values: Array


class FusedDecoder:
    """As `Decoder`, for models of which `unfusable` has nothing to say; not for two threads at a time.

    Moves the model's projections that share an input into one tensor. The parameters become views of it, each still
    whole, contiguous and under its own name.
    """

    def __init__(self, model: Any, end_ids: Sequence[int]) -> None:
        self.model = model
        self._layers = [_layer(layer) for layer in model.model.layers]
        self._addresses = [parameter.data_ptr() for parameter in model.parameters()]
        # A tokenizer's end token can be one that the model has no logit for.
        self._is_end = np.isin(np.arange(model.config.vocab_size), list(end_ids))
        self._table = model.model.embed_tokens.weight
        self._head = model.lm_head.weight
        self._final_norm = _array(model.model.norm.weight)
        self._eps = np.float32(model.model.norm.variance_epsilon)
        attention = model.model.layers[0].self_attn
        self._dim: int = attention.head_dim
        self._heads: int = attention.k_proj.out_features // self._dim
        self._append, self._attend = kernels.attention_kernels(attention.num_key_value_groups, self._dim)
        self._width: int = attention.o_proj.in_features
        self._intermediate: int = model.config.intermediate_size
        self._cos = self._sin = np.empty((0, self._dim // 2), np.float32)
        # Kept, as all members of a step are given the same prompts, in one batch or a few.
        self._tree = functools.lru_cache(maxsize=16)(PromptTree.of)
        self.storage: dict[str, Array] = {}
        self._threads: ThreadPoolExecutor | None = None

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], indices: Sequence[int], sampling: Sampling) -> torch.Tensor:
        """Complete one batch; as `Decoder.run`.

        What all prompts begin with is computed first, then the rest of each, then token after token of those that have
        not ended.
        """
        now = [parameter.data_ptr() for parameter in self.model.parameters()]
        assert now == self._addresses, "a parameter is elsewhere now: weights may change in place only"
        lengths = np.array([len(prompt) for prompt in prompts])
        new = sampling.max_new_tokens
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        self._reach(int(lengths.max()) + new)
        prefix = self._cache("prefix", 1, shared)
        cache = self._cache("rows", len(prompts), int(lengths.max()) - shared + new)
        for start in range(0, shared, PREFILL_TOKENS):
            positions = np.arange(start, min(start + PREFILL_TOKENS, shared))
            places = Places.of(np.zeros_like(positions), positions)
            ids = np.array(prompts[0])[positions]
            self.forward(ids, places, places, prefix, self._cache("none", 1, 0), 0, last=positions[:0])
        hidden = self._prefill(prompts, shared, cache, prefix)
        rows = np.arange(len(prompts))
        numbers = torch.tensor(list(indices), dtype=torch.int64)
        out = np.zeros((len(prompts), new), np.int64)
        out[:, 0] = token = self._choose(hidden, numbers, 0, sampling)
        for step in range(1, new):
            alive = ~self._is_end[token]
            rows = rows[alive]
            token = token[alive]
            if not len(rows):
                break
            places = Places.of(rows, lengths[rows] + (step - 1))
            hidden = self.forward(token, places, places, cache, prefix, shared)
            out[rows, step] = token = self._choose(hidden, numbers[torch.from_numpy(rows)], step, sampling)
        return torch.from_numpy(out)

    def _prefill(self, prompts: Sequence[Sequence[int]], shared: int, cache: _Cache, prefix: _Cache) -> torch.Tensor:
        """Cache the prompts; return the last hidden state of each, `[prompts, hidden]`.

        Prompts that begin alike are computed once as far as they do, and cached in the row of each.
        """
        tree = self._tree(tuple(map(tuple, prompts)), shared)
        found = []
        for start in range(0, len(tree.ids), PREFILL_TOKENS):
            stop = start + PREFILL_TOKENS
            ends = tree.leaves[(tree.leaves >= start) & (tree.leaves < stop)] - start
            nodes = tree.nodes.between(start, stop)
            cached = tree.cached.between(start, stop)
            found.append(self.forward(tree.ids[start:stop], nodes, cached, cache, prefix, shared, ends))
        return torch.cat(found)[torch.from_numpy(np.searchsorted(tree.leaves, tree.last))]

    def forward(
        self,
        ids: Array,
        places: Places,
        cached: Places,
        cache: _Cache,
        prefix: _Cache,
        shared: int,
        last: Array | None = None,
    ) -> torch.Tensor:
        """The last hidden states, normalized, `[tokens, hidden]`: of tokens `last`, or of all.

        Each token sees the positions of its row up to its own, once all have been cached where `cached` says.

        Args:
            ids: the tokens, `[tokens]`.
            places: the cache row that each looks back on, and its position.
            cached: where their keys and values go: a token that several prompts share goes into the row of each.
            cache: of what each row has of its own, from position `shared` on.
            prefix: of the first `shared` positions, which all rows have in common.
            last: numbers of the tokens whose hidden states are wanted.
        """
        # x, float32, is the residual stream. What a block adds to it waits as `change`, to be added in one pass with
        # the normalization that follows.
        x = torch.empty(len(ids), self._table.shape[1])
        self._run(kernels.embed, (ids, _array(x)), _array(self._table))
        change: torch.Tensor | None = None
        for number, layer in enumerate(self._layers):
            # Queries, keys and values of all heads, by one product.
            qkv = linear(self._normalized(x, change, layer.input_norm), layer.qkv, layer.qkv_bias)
            caches = cache.keys[number], cache.values[number]
            rotation = self._cos, self._sin
            self._run(
                self._append, (cached.tokens, cached.rows, cached.positions),
                _array(qkv), *rotation, layer.key_norm, self._eps, *caches, shared,
            )  # fmt: skip
            # All that the last layer's other tokens were for is cached now.
            if last is not None and number == len(self._layers) - 1:
                x = x[last]
                qkv = qkv[last]
                places = Places.of(places.rows[last], places.positions[last])
            # Attention, then the feed-forward layer.
            mixed = qkv.new_empty(len(x), self._width)
            self._run(
                self._attend, (_array(qkv), places.rows, places.positions, _array(mixed)),
                *rotation, layer.query_norm, self._eps, *caches, prefix.keys[number], prefix.values[number], shared,
            )  # fmt: skip
            h = self._normalized(x, linear(mixed, layer.output, layer.output_bias), layer.mlp_norm)
            both = linear(h, layer.gate_up, layer.gate_up_bias)
            gated = both.new_empty(len(x), self._intermediate)
            self._run(kernels.gate, (_array(both), _array(gated)))
            change = linear(gated, layer.down, layer.down_bias)
        return self._normalized(x, change, self._final_norm)

    def _normalized(self, x: torch.Tensor, change: torch.Tensor | None, weight: Array) -> torch.Tensor:
        """Add `change` to the residual stream, and return it normalized: `[tokens, hidden]` all, the last in the
        model's type."""
        out = torch.empty(x.shape, dtype=self._table.dtype)
        if change is None:
            self._run(kernels.normalize, (_array(x), _array(out)), weight, self._eps)
        else:
            self._run(kernels.add_normalize, (_array(x), _array(change), _array(out)), weight, self._eps)
        return out

    def _choose(self, hidden: torch.Tensor, number: torch.Tensor, step: int, sampling: Sampling) -> Array:
        """Each row's next token, `[rows]`, of hidden states `[rows, hidden]` and the prompts' numbers `[rows]`."""
        if sampling.temperature:
            return choose(linear(hidden, self._head), sampling, number, step).numpy()
        best = np.full(len(hidden), -np.inf, np.float32)
        token = np.zeros(len(hidden), np.int64)
        first = 0
        for part in torch.tensor_split(self._head, math.ceil(len(self._head) / HEAD_ROWS)):
            self._run(kernels.running_argmax, (_array(linear(hidden, part)), best, token), first)
            first += len(part)
        return token

    def _run(self, kernel: Callable[..., None], by_token: tuple[Array, ...], *whole: Any) -> None:
        """Run a kernel, its tokens shared out over the threads that PyTorch may use."""
        threads = torch.get_num_threads()
        if threads == 1:
            kernel(*by_token, *whole)
            return
        count = len(by_token[0])
        if self._threads is None:
            self._threads = ThreadPoolExecutor(threads)
        pieces = [slice(count * i // threads, count * (i + 1) // threads) for i in range(threads)]
        list(self._threads.map(lambda piece: kernel(*(array[piece] for array in by_token), *whole), pieces))

    def _cache(self, name: str, rows: int, slots: int) -> _Cache:
        """A cache in storage that is kept from one batch to the next."""
        slots = -(-slots // WIDTH) * WIDTH
        shape = (len(self._layers), rows, self._heads, slots, self._dim)
        size = int(np.prod(shape))
        if name not in self.storage or len(self.storage[name]) < 2 * size:
            self.storage.pop(name, None)  # the old one goes before the new one comes
            with memory_for("the key/value cache", "lower batch_size or max_new_tokens"):
                self.storage[name] = aligned_empty(2 * size, self._final_norm.dtype)
        keys, values = self.storage[name][: 2 * size].reshape(2, *shape)
        return _Cache(keys.reshape(*shape[:3], slots // WIDTH, self._dim, WIDTH), values)

    def _reach(self, positions: int) -> None:
        """Have the rotary embedding's angles for this many positions at hand."""
        if len(self._cos) < positions:
            cos, sin = self.model.model.rotary_emb(torch.empty(0), torch.arange(positions)[None])
            half = self._dim // 2  # the other half repeats it
            self._cos, self._sin = (part[0, :, :half].contiguous().numpy() for part in (cos, sin))


def _layer(layer: Any) -> _Layer:
    attention = layer.self_attn
    mlp = layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    none = np.empty(0, _array(layer.input_layernorm.weight).dtype)
    return _Layer(
        input_norm=_array(layer.input_layernorm.weight),
        qkv=qkv,
        qkv_bias=qkv_bias,
        query_norm=_array(attention.q_norm.weight) if hasattr(attention, "q_norm") else none,
        key_norm=_array(attention.k_norm.weight) if hasattr(attention, "k_norm") else none,
        output=attention.o_proj.weight,
        output_bias=attention.o_proj.bias,
        mlp_norm=_array(layer.post_attention_layernorm.weight),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _joined(*projections: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One tensor for the weights of all, and one for the biases, if any; their parameters become views of it."""
    found: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(projection, name) for projection in projections]
        if parts[0] is None:
            found.append(None)
            continue
        whole = torch.cat([part.data for part in parts])
        for part, view in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
            part.data = view
        found.append(whole)
    weight, bias = found
    assert weight is not None
    return weight, bias


def _array(tensor: torch.Tensor) -> Array:
    """A tensor's own memory, bfloat16 as its bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

"""Decoding on a CPU with as few operations a token as a decoder layer allows: four matrix products and five kernels.

For the models that share Llama's layer (Llama, Mistral, Qwen2, Qwen3), in float32 and bfloat16; the others are decoded
over their own forward, by `decode.Decoder`. What saves work besides the kernels: projections of the same input are one
product, a beginning that prompts share is computed once, nothing is padded, rows that have ended are left out, and the
last layer computes only the last token of each prompt.

A row's completion depends on its prompt alone, to the bit: not on the rows beside it nor on the number of threads.
Where the processor multiplies bfloat16 itself and has no matrix unit, this holds in float32 only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from estune.completion import Sampling
from estune.engines import decode
from estune.engines.cpu import kernels
from estune.engines.cpu.caches import Cache, Caches
from estune.engines.cpu.layers import Linear, are_plain, bits_of, fused_layer, matrix_of
from estune.engines.cpu.low_rank import LowRank, is_plain
from estune.engines.cpu.members import Drawn, Members, Together, address
from estune.engines.cpu.products import NONE, Array, Coded, Products
from estune.engines.cpu.simd import WIDTH
from estune.engines.memory import aligned_empty
from estune.engines.progress import Meter
from estune.engines.sampling import choose
from estune.engines.tree import Places, PromptTree, common_prefix
from estune.weights.tensors import widen

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
PREFILL_TOKENS = decode.PREFILL_TOKENS["cpu"]
SHARED_OUT = 256
"""Tokens from which on threads share the passes between products. Attention is always shared."""
HEAD_ROWS = 8192
"""Entries of the vocabulary whose logits are computed at once; only the largest logit is kept."""

_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}  # those whose angles do not depend on the length of a batch


def has_own_products(config: Any, widths: Iterable[int], dtype: str) -> bool:
    """Whether the products of such a model are those of our kernels, as far as its configuration tells."""
    fused = (getattr(config, "architectures", None) or [""])[0] in ARCHITECTURES
    return fused and dtype != "float16" and not any(width % WIDTH for width in widths)


def unfusable(model: Any) -> str | None:
    """Why `FusedDecoder` cannot serve `model`, or None."""
    config = model.config
    if type(model).__name__ not in ARCHITECTURES or not type(model).__module__.startswith("transformers."):
        return "its layers may differ from Llama's"
    attention = model.model.layers[0].self_attn
    window = getattr(config, "sliding_window", None)
    widths = (config.hidden_size, config.intermediate_size, attention.head_dim // 2)
    reasons = {
        "its adapter is more than products beside its layers'": not is_plain(model),
        "its projections are not plain matrices": not are_plain(model.model.layers, model.dtype),
        "it is not on a CPU": model.device.type != "cpu",
        "its type is neither float32 nor bfloat16": model.dtype not in (torch.float32, torch.bfloat16),
        f"its activation is {config.hidden_act}": config.hidden_act != "silu",
        "its rotary embedding depends on the length": model.model.rotary_emb.rope_type not in _FIXED_ROPES,
        "it looks back over a window": window is not None and window < config.max_position_embeddings,
        f"its widths are no multiples of {WIDTH}": any(width % WIDTH for width in widths),
        "its vocabulary is smaller than a vector": config.vocab_size < WIDTH,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class FusedDecoder:
    """As `Decoder`, for models for which `unfusable` gives no reason; not for two threads at a time.

    Moves the model's projections that share an input into one tensor. The parameters become views of it, each still
    whole, contiguous and under its own name.
    """

    def __init__(self, model: Any, end_ids: Sequence[int]) -> None:
        self.model = model
        self._layers = [fused_layer(layer) for layer in model.model.layers]
        self._adapter = LowRank(model.model.layers, self._layers)
        self._parameters = list(model.parameters())
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        # A tokenizer's end token can be one that the model has no logit for.
        self._is_end = np.isin(np.arange(model.config.vocab_size), list(end_ids))
        self._table = matrix_of(model.model.embed_tokens)
        self._head = Linear(matrix_of(model.lm_head), NONE)
        self._final_norm = bits_of(model.model.norm.weight)
        self._eps = np.float32(model.model.norm.variance_epsilon)
        attention = model.model.layers[0].self_attn
        self._dim: int = attention.head_dim
        self._heads: int = attention.k_proj.out_features // self._dim
        self._append, self._attend = kernels.attention_kernels(attention.num_key_value_groups, self._dim)
        self._product = Products()
        self._width: int = attention.o_proj.in_features
        self._intermediate: int = model.config.intermediate_size
        self._cos = self._sin = np.empty((0, self._dim // 2), np.float32)
        # Kept, as all members of a step are given the same prompts, in one batch or a few.
        self._tree = functools.lru_cache(maxsize=16)(PromptTree.of)
        self.caches = Caches(len(self._layers), self._heads, self._dim, self._final_norm.dtype)
        self._members: Members | None = None  # whose rows are decoded

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        sampling: Sampling,
        told: Callable[[int], None] = lambda token: None,
        members: Members | None = None,
    ) -> torch.Tensor:
        """Complete one batch; as `Decoder.run`.

        The beginning that all prompts share is computed first, then the rest of each, then token after token of those
        that have not ended.

        Args:
            prompts, indices, sampling: as for `Decoder.run`.
            told: for a batch of one prompt, called with each token as it is chosen.
            members: whose weights complete the prompts; by default those that the model has.
        """
        self.begin()
        self._members = members
        try:
            return self._complete(prompts, indices, sampling, told)
        finally:
            self._members = None

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        sampling: Sampling,
        told: Callable[[int], None],
    ) -> torch.Tensor:
        members = self._members
        owners = members.owners.tolist() if members is not None else [0] * len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts])
        new = sampling.max_new_tokens
        shared = common_prefix(prompts) // WIDTH * WIDTH if len(prompts) > 1 and members is None else 0
        meter = Meter()
        self.reach(int(lengths.max()) + new)
        prefix = self.caches.kept("prefix", 1, shared)
        cache = self.caches.kept("rows", len(prompts), int(lengths.max()) - shared + new)
        for start in range(0, shared, PREFILL_TOKENS):
            positions = np.arange(start, min(start + PREFILL_TOKENS, shared))
            places = Places.of(np.zeros_like(positions), positions)
            ids = np.array(prompts[0])[positions]
            self.forward(ids, places, places, prefix, self.caches.kept("none", 1, 0), 0, last=positions[:0])
        meter.read(shared * len(prompts))
        hidden = self._prefill(prompts, owners, shared, cache, prefix, meter)
        rows = np.arange(len(prompts))
        numbers = torch.tensor(list(indices), dtype=torch.int64)
        out = np.zeros((len(prompts), new), np.int64)
        out[:, 0] = token = self._choose(hidden, rows, numbers, 0, sampling)
        told(int(token[0]))
        meter.wrote(len(token))
        for step in range(1, new):
            alive = ~self._is_end[token]
            meter.wrote(0, spared=(len(token) - int(alive.sum())) * (new - step))
            rows = rows[alive]
            token = token[alive]
            if not len(rows):
                break
            places = Places.of(rows, lengths[rows] + (step - 1))
            hidden = self.forward(token, places, places, cache, prefix, shared)
            out[rows, step] = token = self._choose(hidden, rows, numbers[torch.from_numpy(rows)], step, sampling)
            told(int(token[0]))
            meter.wrote(len(token))
        return torch.from_numpy(out)

    def together(self, tensors: Mapping[int, Drawn]) -> Together | None:
        """What draws members whose noise is of low rank; None where they cannot be decoded together.

        Args:
            tensors: what members perturb, by the address of its memory.
        """
        of_heads = [norm for layer in self._layers for norm in (layer.query_norm, layer.key_norm) if norm.size]
        if any(address(norm) in tensors for norm in of_heads):
            return None  # attention takes them as they are
        if self._adapter:
            return None  # members perturb it, and what they have in common is not the weights alone
        linears = [each for layer in self._layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        norms = [norm for layer in self._layers for norm in (layer.input_norm, layer.mlp_norm)]
        return Together([*linears, self._head], [*norms, self._final_norm], self._table, tensors)

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], logits: int
    ) -> list[list[float]]:
        """Log-probability (nats) of every token of every completion; as `score.log_probabilities`."""
        self.begin()
        rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
        longest = max(map(len, rows))
        self.reach(longest)
        cache = self.caches.kept("rows", len(rows), longest)
        none = self.caches.kept("none", 1, 0)
        tree = PromptTree.of(rows, 0)
        # 1. Find the nodes after which a completion's tokens come, by rising node, and these tokens.
        first = np.array([len(prompt) - 1 for prompt in prompts])
        wanted = tree.cached.positions >= first[tree.cached.rows]
        nodes, of, at = (part[wanted] for part in (tree.cached.tokens, tree.cached.rows, tree.cached.positions))
        at = at - first[of]
        following = torch.tensor([completions[row][place] for row, place in zip(of, at, strict=True)])
        found = [[0.0] * len(completion) for completion in completions]
        # 2. Compute some nodes at a time, and logits of as many of these as may be held.
        most = max(1, logits // len(self._is_end))
        for start in range(0, len(tree.ids), PREFILL_TOKENS):
            stop = min(start + PREFILL_TOKENS, len(tree.ids))
            places = tree.nodes.between(start, stop), tree.cached.between(start, stop)
            hidden = self.forward(tree.ids[start:stop], *places, cache, none, 0)
            low, high = np.searchsorted(nodes, (start, stop)).tolist()
            for begin in range(low, high, most):
                part = slice(begin, min(begin + most, high))
                values = torch.from_numpy(self._product(hidden[nodes[part] - start], *self._head))
                chosen = values.gather(1, following[part, None]).squeeze(1) - values.logsumexp(1)
                for row, place, value in zip(of[part], at[part], chosen.tolist(), strict=True):
                    found[row][place] = value
        return found

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        shared: int,
        cache: Cache,
        prefix: Cache,
        meter: Meter,
    ) -> Array:
        """Cache the prompts; return the last hidden state of each, `[prompts, hidden]`.

        A beginning that prompts of one owner share is computed once, and cached in the row of each.
        """
        tree = self._tree(tuple(map(tuple, prompts)), shared, tuple(owners))
        found = []
        count = len(tree.ids)
        left = sum(map(len, prompts)) - shared * len(prompts)  # a beginning that several share counts for each
        for start in range(0, count, PREFILL_TOKENS):
            stop = start + PREFILL_TOKENS
            ends = tree.leaves[(tree.leaves >= start) & (tree.leaves < stop)] - start
            nodes = tree.nodes.between(start, stop)
            cached = tree.cached.between(start, stop)
            found.append(self.forward(tree.ids[start:stop], nodes, cached, cache, prefix, shared, ends))
            meter.read(left * min(stop, count) // count - left * start // count)
        return np.concatenate(found)[np.searchsorted(tree.leaves, tree.last)]

    def forward(
        self,
        ids: Array,
        places: Places,
        cached: Places,
        cache: Cache,
        prefix: Cache,
        shared: int,
        last: Array | None = None,
    ) -> Array:
        """The last hidden states, normalized, `[tokens, hidden]`: of tokens `last`, or of all.

        Each token sees the positions of its row up to its own, once all have been cached where `cached` says.

        Args:
            ids: token ids, `[tokens]`.
            places: the cache row that each token looks back on, and its position.
            cached: where their keys and values go: a token that several prompts share goes into the row of each.
            cache: keys and values that each row has of its own, from position `shared` on.
            prefix: keys and values of the first `shared` positions, which all rows have in common.
            last: numbers of the tokens whose hidden states are wanted.
        """
        # x, float32, is the residual stream. What a block adds to it waits as `change`, to be added in one pass with
        # the normalization that follows.
        x = aligned_empty((len(ids), self.model.config.hidden_size))
        if isinstance(self._table, Coded):
            x[:] = widen(self._table[ids].widened())
        else:
            self._run(kernels.embed, (ids, x), self._table)
        if self._members is not None:
            self._members.add_embeddings(ids, x, self._table, places.rows)
        change: Array | None = None
        for number, layer in enumerate(self._layers):
            # Queries, keys and values of all heads, by one product.
            qkv = self._project(self._normalized(x, change, layer.input_norm, places), layer.qkv, places)
            caches = cache.keys[number], cache.values[number]
            rotation = self._cos, self._sin
            self._run(
                self._append, (cached.tokens, cached.rows, cached.positions),
                qkv, *rotation, layer.key_norm, self._eps, *caches, shared,
            )  # fmt: skip
            # All that the last layer's other tokens were for is cached now.
            if last is not None and number == len(self._layers) - 1:
                x = x[last]
                qkv = qkv[last]
                places = Places.of(places.rows[last], places.positions[last])
            # Attention, then the feed-forward layer.
            mixed = aligned_empty((len(x), self._width))
            self._run(
                self._attend, (qkv, places.rows, places.positions, mixed),
                *rotation, layer.query_norm, self._eps, *caches, prefix.keys[number], prefix.values[number], shared,
            )  # fmt: skip
            h = self._normalized(x, self._project(mixed, layer.output, places), layer.mlp_norm, places)
            both = self._project(h, layer.gate_up, places)
            gated = aligned_empty((len(x), self._intermediate))
            self._run(kernels.gate, (both, gated))
            change = self._project(gated, layer.down, places)
        return self._normalized(x, change, self._final_norm, places)

    def _project(self, x: Array, linear: Linear, places: Places) -> Array:
        """A projection of tokens, `[tokens, columns]`, each by the weights of the member that it belongs to."""
        out = self._product(x, *linear)
        self._adapter.add(x, out, linear, self._product)
        if self._members is not None:
            self._members.add_product(x, out, linear, places.rows, self._product)
        return out

    def _normalized(self, x: Array, change: Array | None, weight: Array, places: Places) -> Array:
        """Add `change` to the residual stream, and return it normalized: `[tokens, hidden]` all."""
        out = aligned_empty(x.shape)
        of_members = None if self._members is None else self._members.norm(weight)
        used = weight if of_members is None else np.ones(len(weight), np.float32)
        if change is None:
            self._run(kernels.normalize, (x, out), used, self._eps)
        else:
            self._run(kernels.add_normalize, (x, change, out), used, self._eps)
        if self._members is not None and of_members is not None:
            out *= of_members[self._members.owners[places.rows]]
        return out

    def _choose(self, hidden: Array, rows: Array, number: torch.Tensor, step: int, sampling: Sampling) -> Array:
        """Each row's next token, `[rows]`, from hidden states `[rows, hidden]` and the prompts' numbers `[rows]`."""
        if sampling.temperature:
            return choose(self.logits(hidden, rows), sampling, number, step).numpy()
        return self.largest(hidden, rows)

    def logits(self, hidden: Array, rows: Array | None = None) -> torch.Tensor:
        """Logits, float32 `[rows, vocabulary]`, from hidden states `[rows, hidden]`."""
        found = self._product(hidden, *self._head)
        if self._members is not None and rows is not None:
            self._members.add_product(hidden, found, self._head, rows, self._product)
        return torch.from_numpy(found)

    def largest(self, hidden: Array, rows: Array | None = None) -> Array:
        """The token with the largest logit, `[rows]`, from hidden states `[rows, hidden]`.

        Args:
            hidden: the hidden states.
            rows: the cache row of each, where they are members'.
        """
        best = np.full(len(hidden), -np.inf, np.float32)
        token = np.zeros(len(hidden), np.int64)
        first = 0
        count = len(self._head.weight)
        bounds = np.linspace(0, count, math.ceil(count / HEAD_ROWS) + 1).astype(int).tolist()
        for part in (self._head.weight[begin:end] for begin, end in pairwise(bounds)):
            logits = self._product(hidden, part)
            if self._members is not None and rows is not None:
                self._members.add_product(hidden, logits, self._head, rows, self._product, first)
            self._run(kernels.running_argmax, (logits, best, token), first)
            first += len(part)
        return token

    def begin(self) -> None:
        """Take the weights as they are now; to be called before tokens are computed by others than before."""
        now = [parameter.data_ptr() for parameter in self._parameters]
        assert now == self._addresses, "a parameter is elsewhere now: weights may change in place only"
        self._adapter.pack()

    def _run(self, kernel: Callable[..., None], by_token: tuple[Array, ...], *whole: Any) -> None:
        """Run a kernel, its tokens shared out over the threads; a few tokens are done here, sooner than others wake."""
        count = len(by_token[0])
        if count < SHARED_OUT and kernel is not self._attend:
            kernel(*by_token, *whole)
            return
        self._product.in_parts(count, lambda first, last: kernel(*(array[first:last] for array in by_token), *whole))

    def reach(self, positions: int) -> None:
        """Compute the rotary embedding's angles for this many positions, unless they are there."""
        if len(self._cos) < positions:
            cos, sin = self.model.model.rotary_emb(torch.empty(0), torch.arange(positions)[None])
            half = self._dim // 2  # the other half repeats it
            self._cos, self._sin = (part[0, :, :half].contiguous().numpy() for part in (cos, sin))

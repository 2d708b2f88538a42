"""Does it pay to decode several members in one forward? Their noise is full-rank: each has matrices of its own.

    python -m bench.speed.population_batching [--together 2 4 8] [--device cuda] [--model tiny]

A forward of M members multiplies a stack of M batches by a stack of M matrices (`baddbmm`); rows of all members meet in
one attention call. It does the same arithmetic as M forwards, in an Mth of the operations. Both ways run the same code,
for M members and for one; the engine's own decoder is measured beside them. All complete the same prompts greedily, to
the same number of tokens, and must agree on them first. A GPU replays either way from a CUDA graph of the whole
completion, so that the time to launch operations, which graphs take away already, counts for neither.

Times are for all members of the largest group; perturbing, the same for both, is left out. A ratio above 1 says by how
much decoding together is faster.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench.common import medians, options, rounded, settings, write_result

from estune.completion import Sampling
from estune.engines.decode import Decoder
from estune.engines.graph import CudaRecorder, GraphDecoder
from estune.engines.loading import load_model
from estune.weights.locate import locate


class Together:
    """Members of one Qwen2 model, their weights stacked `[members, ...]`, completing prompts of one length.

    Cache: `[members * rows, heads, slots, head_dim]` per layer.
    """

    def __init__(self, members: Sequence[Any], prompts: torch.Tensor, new: int) -> None:
        first = members[0]
        self.config, self.rotary = first.config, first.model.rotary_emb
        self.weights = {
            name: torch.stack([m.get_parameter(name) for m in members]) for name, _ in first.named_parameters()
        }
        self.count, self.new = len(members), new
        self.rows, self.width = prompts.shape
        self.ids = prompts.repeat(self.count, 1).view(self.count, -1)
        self.out = torch.zeros(self.count * self.rows, new, dtype=torch.int64, device=prompts.device)
        self.head_dim = self.config.hidden_size // self.config.num_attention_heads
        shape = (self.count * self.rows, self.config.num_key_value_heads, self.width + new, self.head_dim)
        cache = functools.partial(torch.zeros, shape, dtype=first.dtype, device=prompts.device)
        self.caches = [(cache(), cache()) for _ in range(self.config.num_hidden_layers)]

    @torch.inference_mode()
    def complete(self) -> torch.Tensor:
        """Greedy completions `[members, rows, new]`."""
        token = self.forward(self.ids, 0, self.width)
        self.out[:, 0] = token.flatten()
        for step in range(1, self.new):
            token = self.forward(token, self.width + step - 1, 1)
            self.out[:, step] = token.flatten()
        return self.out.view(self.count, self.rows, self.new)

    def forward(self, ids: torch.Tensor, begin: int, queries: int) -> torch.Tensor:
        """Tokens `[members, rows * queries]` at slots from `begin` on: the next token of each row `[members, rows]`."""
        x = self.weights["model.embed_tokens.weight"][torch.arange(self.count, device=ids.device)[:, None], ids]
        positions = torch.arange(begin, begin + queries, device=ids.device)[None]
        cos, sin = self.rotary(x, positions)
        for layer, (keys, values) in enumerate(self.caches):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm.weight")
            q, k, v = (self.linear(h, f"{name}self_attn.{part}_proj") for part in "qkv")
            q, k, v = (
                part.view(self.count * self.rows, queries, -1, self.head_dim).transpose(1, 2) for part in (q, k, v)
            )
            keys[:, :, begin : begin + queries] = rotate(k, cos, sin)
            values[:, :, begin : begin + queries] = v
            end = begin + queries
            mixed = F.scaled_dot_product_attention(
                rotate(q, cos, sin), keys[:, :, :end], values[:, :, :end], is_causal=queries > 1, enable_gqa=True
            )
            x = x + self.linear(mixed.transpose(1, 2).reshape(h.shape), name + "self_attn.o_proj")
            h = self.norm(x, name + "post_attention_layernorm.weight")
            gate = F.silu(self.linear(h, name + "mlp.gate_proj")) * self.linear(h, name + "mlp.up_proj")
            x = x + self.linear(gate, name + "mlp.down_proj")
        last = x.view(self.count, self.rows, queries, -1)[:, :, -1]
        return self.linear(self.norm(last, "model.norm.weight"), "model.embed_tokens").argmax(-1)  # embeddings are tied

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"].mT, self.weights.get(name + ".bias")
        if self.count == 1:  # as one would write it for one member
            return F.linear(x[0], weight[0].mT, None if bias is None else bias[0])[None]
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config.rms_norm_eps) * self.weights[name][:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def perturbed(model: Any, seed: int, sigma: float) -> Any:
    member = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    for parameter in member.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter), alpha=sigma)
    return member


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The same call, replayed from one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def measure(model: Any, prompts: torch.Tensor, new: int, most: int, groups: Sequence[int], args: Any) -> dict[str, Any]:
    """Seconds to complete `prompts` with `most` members, one after another and in groups."""
    cuda = model.device.type == "cuda"
    members = [perturbed(model, seed, args.sigma) for seed in range(most)]
    rows: Sequence[Sequence[int]] = prompts.tolist()
    decoders: list[Decoder] = [
        GraphDecoder(m, [], 0, CudaRecorder(m.device)) if cuda else Decoder(copy.deepcopy(m), [], 0) for m in members
    ]
    ours = [decoder.run(rows, range(len(rows)), Sampling(new)) for decoder in decoders]
    work: dict[str, list[Callable[[], object]]] = {
        "decoder": [functools.partial(d.run, rows, range(len(rows)), Sampling(new)) for d in decoders]
    }
    agree = {}
    for size in (1, *groups):
        parts = [Together(members[at : at + size], prompts, new) for at in range(0, most, size)]
        found = torch.cat([part.complete() for part in parts]).cpu()
        name = "one after another" if size == 1 else f"{size} together"
        agree[name] = float((found == torch.stack(ours)).all(-1).float().mean())
        work[name] = [captured(part.complete) if cuda else part.complete for part in parts]

    def run(calls: list[Callable[[], object]]) -> None:
        for call in calls:
            call()
        if cuda:
            torch.cuda.synchronize()

    seconds = medians({name: functools.partial(run, calls) for name, calls in work.items()}, args.repeats, 1)
    ratios = {name: seconds["one after another"] / seconds[name] for name in seconds if name.endswith("together")}
    return {
        "completions that agree with the decoder": agree,
        "seconds": seconds,
        "faster than one after another": ratios,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--together", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--prompts", nargs="+", type=int, default=[25, 200])
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--sigma", type=float, default=0.012)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(locate(args.model), args.dtype, torch.device(args.device))
    draw = torch.Generator().manual_seed(0)
    most = max(args.together)
    found = {}
    for count in args.prompts:
        prompts = torch.randint(4, model.config.vocab_size // 2, (count, args.length), generator=draw)
        found[f"{count} prompts"] = measure(model, prompts.to(args.device), args.new_tokens, most, args.together, args)
    write_result("population_batching", {"settings": settings(args), "members": most, **rounded(found)}, args.results)


if __name__ == "__main__":
    main()

"""How fast weights on a GPU are perturbed, restored, updated and fingerprinted; needs one.

    python -m bench.speed.gpu

First the kernels' noise is compared with the known answers of `tests/data/noise_vectors.json`, and a wrong bit ends the
script. (`pytest tests/noise/test_noise_gpu.py tests/weights/test_weights_gpu.py` compares everything else.)

Then, for bfloat16 weights of the shapes of Qwen2.5 models, median milliseconds of:

- `perturb`: live = round(base + sigma * noise), one fused pass over all tensors;
- `restore`: live = round(base), a pass over the same bytes without noise: what memory bandwidth and launches cost;
- `update`: N = 30 members, once, with `update, extra memory`, the peak of what it allocates on the device;
- `fingerprint`: of the base.

`master` keeps a float32 base on the device, `copy` one in bfloat16, `host` a float32 base in pinned host memory.
The GB/s are those of the bytes that a pass has to move.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from bench.common import medians, options, rounded, settings, write_result

from estune.es.strategy import Member, Update
from estune.noise import gpu, reference
from estune.noise.rows import Run
from estune.weights.parameters import Parameter
from estune.weights.weights import Weights

VECTORS = Path(__file__).parents[2] / "tests" / "data" / "noise_vectors.json"
# hidden, layers, width of keys and of values, intermediate, vocabulary, whether the output layer is a matrix of its own
SHAPES = {
    "0.5B": (896, 24, 128, 4864, 151936, False),
    "3B": (2048, 36, 256, 11008, 151936, False),
    "7B": (3584, 28, 512, 18944, 152064, True),
}
MEMBERS, SIGMA = 30, 0.001


def check_known_answers() -> int:
    """Compare every vector; return how many there are."""
    vectors = json.loads(VECTORS.read_text())["vectors"]
    base, live = torch.zeros(1, device="cuda"), torch.empty(1, device="cuda")
    for v in vectors:
        run = Run(live, base, 0, reference.tensor_id(v["tensor"]), v["index"])
        gpu.Batch([run]).perturb(v["seed"], 1.0)
        found = f"{int(live.cpu().numpy().view(np.uint32)[0]):08x}"
        if found != v["bits"]:
            raise SystemExit(f"seed {v['seed']}, {v['tensor']}, index {v['index']}: {found}, not {v['bits']}")
    return len(vectors)


def parameters(size: str) -> list[Parameter]:
    """Random bfloat16 tensors with the names and shapes of a Qwen2.5 model."""
    hidden, layers, kv, intermediate, vocabulary, untied = SHAPES[size]
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,)} | ({"lm_head.weight": (vocabulary, hidden)} if untied else {})
    return [Parameter(n, torch.randn(s, device="cuda", dtype=torch.bfloat16).mul_(0.02)) for n, s in shapes.items()]


def measure(tensors: list[Parameter], policy: Any, on_host: bool, repeats: int) -> dict[str, float]:
    """Milliseconds and GB/s of each pass."""
    weights = Weights(tensors, policy=policy, base_on_host=on_host)
    elements, width = sum(p.tensor.numel() for p in tensors), 4 if policy == "master" else 2
    seeds = iter(range(2**63, 2**64))
    update = Update(0, tuple(Member(next(seeds)) for _ in range(MEMBERS)), (1e-6,) * MEMBERS)

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    passes = {
        "perturb": finished(lambda: weights.perturb(Member(next(seeds)), SIGMA)),
        "restore": finished(weights.restore),
        "fingerprint": finished(weights.fingerprint),
    }
    seconds = medians(passes, repeats)
    apply = finished(lambda: weights.apply(update))
    apply()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds |= medians({"update": apply}, max(1, repeats // 5), warm_up=0)
    extra = torch.cuda.max_memory_allocated() - before
    moved = {"perturb": width + 2, "restore": width + 2, "fingerprint": width, "update": 2 * width}
    return {
        **{f"{name}, ms": 1e3 * s for name, s in seconds.items()},
        **{f"{name}, GB/s": moved[name] * elements / s / 1e9 for name, s in seconds.items()},
        "perturb / restore": seconds["perturb"] / seconds["restore"],
        "update, billion normals a second": MEMBERS * elements / seconds["update"] / 1e9,
        "update, extra memory, MB": extra / 1e6,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "settings": settings(arguments),
        "known answers that agree": check_known_answers(),
    }
    for size in arguments.sizes:
        tensors = parameters(size)
        elements = sum(p.tensor.numel() for p in tensors)
        found: dict[str, Any] = {"tensors": len(tensors), "elements": elements}
        for label, policy, on_host in (("master", "master", False), ("copy", "copy", False), ("host", "master", True)):
            needed = torch.cuda.memory_allocated() + elements * (0 if on_host else 4)
            if needed < 0.9 * torch.cuda.get_device_properties(0).total_memory:
                found[label] = measure(tensors, policy, on_host, arguments.repeats)
        figures[size] = found
        del tensors
        torch.cuda.empty_cache()
    write_result("gpu", rounded(figures), arguments.results)


if __name__ == "__main__":
    main()

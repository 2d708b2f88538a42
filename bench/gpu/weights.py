"""How fast weights on a GPU are perturbed, restored, updated and fingerprinted.

    python -m bench.gpu.weights [--sizes 0.5B 3B 7B] [--device cuda] [--repeats 15]

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
from bench.common import medians, options, rounded, settings, write_result
from bench.gpu import accelerator
from bench.models import QWEN_SHAPES, SHAPES, random_model

from estune.engines.memory import total_memory
from estune.es.strategy import Member, Update
from estune.noise import cpu, reference
from estune.noise.rows import Run
from estune.weights.device import chosen_device, device_kernels
from estune.weights.parameters import Parameter
from estune.weights.weights import Weights

VECTORS = Path(__file__).parents[2] / "tests" / "data" / "noise_vectors.json"
MEMBERS, SIGMA = 30, 0.001


def check_known_answers(device: torch.device) -> int:
    """Compare every vector; return how many there are."""
    vectors = json.loads(VECTORS.read_text())["vectors"]
    base, live = torch.zeros(1, device=device), torch.empty(1, device=device)
    for v in vectors:
        noise = v["seed"], reference.tensor_id(v["tensor"]), v["index"]
        if device.type == "cuda":
            device_kernels().Batch([Run(live, base, 0, *noise[1:])]).perturb(v["seed"], 1.0)
        else:
            cpu.perturb(live.numpy(), base.numpy(), *noise, 1.0)
        found = f"{int(live.cpu().numpy().view(np.uint32)[0]):08x}"
        if found != v["bits"]:
            raise SystemExit(f"seed {v['seed']}, {v['tensor']}, index {v['index']}: {found}, not {v['bits']}")
    return len(vectors)


def parameters(size: str, device: torch.device) -> list[Parameter]:
    """The bfloat16 tensors of a random model."""
    model = random_model(size, 0.02, dtype=torch.bfloat16, device=str(device))
    return [Parameter(name, tensor.data) for name, tensor in model.named_parameters()]


def copy_seconds(tensors: list[Parameter], dtype: torch.dtype, on_host: bool, repeats: int) -> float:
    """Median seconds of PyTorch's copy of bases of this type into the live tensors. No base outlives it."""
    live = [p.tensor for p in tensors]
    device = live[0].device
    place: dict[str, Any] = {"device": "cpu", "pin_memory": True} if on_host else {"device": device}
    bases = [torch.zeros(t.shape, dtype=dtype, **place) for t in live]
    copy = _finished(lambda: torch._foreach_copy_(live, bases, non_blocking=True), device)
    return medians({"copy": copy}, repeats)["copy"]


def _finished(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The work, and waiting for the device to have done it."""

    def run() -> None:
        work()
        torch.get_device_module(device).synchronize()

    return run


def measure(tensors: list[Parameter], policy: Any, on_host: bool, repeats: int) -> dict[str, float]:
    """Milliseconds and GB/s of each pass."""
    device = tensors[0].tensor.device
    copying = copy_seconds(tensors, torch.float32 if policy == "master" else torch.bfloat16, on_host, repeats)
    weights = Weights(tensors, policy=policy, base_on_host=on_host)
    elements, width = sum(p.tensor.numel() for p in tensors), 4 if policy == "master" else 2
    seeds = iter(range(2**63, 2**64))
    update = Update(0, tuple(Member(next(seeds)) for _ in range(MEMBERS)), (1e-6,) * MEMBERS)

    def finished(work: Callable[[], object]) -> Callable[[], None]:
        return _finished(work, device)

    passes = {
        "perturb": finished(lambda: weights.perturb(Member(next(seeds)), SIGMA)),
        "restore": finished(weights.restore),
        "fingerprint": finished(weights.fingerprint),
    }
    seconds = medians(passes, repeats) | {"copy": copying}
    apply = finished(lambda: weights.apply(update))
    apply()  # compiles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds |= medians({"update": apply}, max(1, repeats // 5), warm_up=0)
    extra = torch.cuda.max_memory_allocated() - before
    moved = {"perturb": width + 2, "restore": width + 2, "copy": width + 2, "fingerprint": width, "update": 2 * width}
    return {
        **{f"{name}, ms": 1e3 * s for name, s in seconds.items()},
        **{f"{name}, GB/s": moved[name] * elements / s / 1e9 for name, s in seconds.items()},
        "perturb / copy": seconds["perturb"] / seconds["copy"],
        "update, billion normals a second": MEMBERS * elements / seconds["update"] / 1e9,
        "update, extra memory, MB": extra / 1e6,
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=[*SHAPES, *QWEN_SHAPES], default=list(QWEN_SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    figures: dict[str, Any] = {
        "settings": settings(arguments),
        **accelerator(device),
        "known answers that agree": check_known_answers(device),
    }
    for size in arguments.sizes:
        tensors = parameters(size, device)
        elements = sum(p.tensor.numel() for p in tensors)
        found: dict[str, Any] = {"tensors": len(tensors), "elements": elements}
        for label, policy, on_host in (("master", "master", False), ("copy", "copy", False), ("host", "master", True)):
            needed = torch.cuda.memory_allocated() + elements * (0 if on_host else 4)
            if (device.type == "cuda" and needed > 0.9 * total_memory(device)) or (device.type == "cpu" and on_host):
                continue
            found[label] = measure(tensors, policy, on_host, arguments.repeats)
        figures[size] = found
        del tensors
        torch.cuda.empty_cache()
        write_result("gpu-weights", rounded(figures), arguments.results)


if __name__ == "__main__":
    main()

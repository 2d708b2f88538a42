"""How fast is the distance from the base model, which every evaluation tells, against NumPy on one thread?

    python -m bench.speed.distance [--size 0.5B] [--threads 2] [--repeats 5]

Of a random bfloat16 model, its file in the page cache. `copy` keeps a bfloat16 base, `master` a float32 one; `NumPy`
widens a million elements of base and checkpoint at a time and takes two dot products. All three take turns. The bar is
300 million weights a second on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.common import medians, options, rounded, settings, write_result
from bench.models import QWEN_SHAPES, SHAPES, save_random_model
from transformers import AutoModelForCausalLM

from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from estune.weights.tensors import RUN_LENGTH
from estune.weights.weights import Weights


def by_numpy(base: Checkpoint, checkpoint: Checkpoint) -> tuple[float, float]:
    """Sums of squares of the difference and of the checkpoint."""
    difference = norm = 0.0
    for name, tensor in checkpoint.tensors.items():
        for start in range(0, tensor.elements, RUN_LENGTH):
            count = min(RUN_LENGTH, tensor.elements - start)
            then = tensor.read(start, count)
            change = base.tensors[name].read(start, count) - then
            difference += float(np.dot(change, change))
            norm += float(np.dot(then, then))
    return difference, norm


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=[*SHAPES, *QWEN_SHAPES], default="0.5B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(save_random_model(args.size, Path(folder, "model"), init=0.02, dtype=torch.bfloat16))
        work: dict[str, Any] = {"NumPy": lambda: by_numpy(checkpoint, checkpoint)}
        for policy in ("copy", "master"):
            model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
            weights = Weights(trained_parameters(model, checkpoint.tensors), policy=policy, threads=args.threads)
            work[policy] = lambda weights=weights: weights.change(checkpoint)
        elements = sum(t.elements for t in checkpoint.tensors.values())
        seconds = medians(work, args.repeats, warm_up=1)
    rates = {name: elements / s / 1e6 for name, s in seconds.items()}
    figures = {"settings": settings(args), "weights": elements, "million weights a second": rates}
    write_result("distance", rounded(figures), args.results)


if __name__ == "__main__":
    main()

"""What cumulative step-size adaptation would listen to: how much longer the path of updates is than chance has it.

    python -m bench.exactness.path [--steps 40] [--seed 0]

The embedded model learns Countdown with its own settings. Then each update is made again from seeds and coefficients,
and the inner products of all of them give the squared length of any part of the path. Cumulative step-size adaptation
compares that with what updates in independent directions would come to, which coefficients alone tell: the number of
weights times the sum of their squares. Recorded is the ratio of the two over all parts of a length that follow each
other, and the cosines between updates: one over the root of the number of weights is what independent ones have. The
cosines are recorded for each kind of tensor, too, over all layers, as each could have a step size of its own. Nothing
is timed.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench.common import options, rounded, settings, write_result

from estune import Config, Trainer
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.noise.cpu_draw import normal
from estune.noise.reference import tensor_id

Products = npt.NDArray[np.float64]
PARTS = (1, 2, 5, 10, 20, 40)  # steps


def train(folder: Path, steps: int, seed: int) -> Journal:
    """The journal of a run, whose evaluations are left out."""
    config = Config(
        output_dir=folder, steps=steps, seed=seed, eval_steps=0, eval_on_start=False, compare_with_base=False,
        log_completions=0, report_to=[],
    )  # fmt: skip
    Trainer(config, monitors=[]).train()
    return Journal.read(folder)


def kind_of(name: str) -> str:
    """What a tensor is, in all layers: `self_attn.q_proj.weight` of `model.layers.3.self_attn.q_proj.weight`."""
    return re.sub(r"^model\.(layers\.\d+\.)?", "", name)


def inner_products(journal: Journal) -> dict[str, tuple[Products, int]]:
    """Of all pairs of updates, `[steps][steps]`, and the number of weights, for each kind of tensor."""
    base = base_checkpoint(journal.header, journal.base_model())
    steps = len(journal.steps)
    found = {kind_of(name): (np.zeros((steps, steps)), 0) for name in journal.header.tensors}
    for name in journal.header.tensors:
        count = base.tensors[name].elements
        updates = np.zeros((steps, count))
        for row, record in enumerate(journal.steps):
            for seed, coefficient in record.update.pairs:
                updates[row] += coefficient * normal(seed, tensor_id(name), 0, count).astype(np.float64)
        products, weights = found[kind_of(name)]
        found[kind_of(name)] = products + updates @ updates.T, weights + count
    return found


def cosines(products: Products, weights: int) -> dict[str, Any]:
    """Of all pairs of updates, and the root mean square that independent ones have."""
    lengths = np.sqrt(np.diag(products))
    found = (products / np.outer(lengths, lengths))[np.triu_indices(len(lengths), 1)]
    return rounded(
        {
            "pairs": len(found),
            "mean": found.mean().item(),
            "root_mean_square": math.sqrt((found**2).mean()),
            "by_chance": 1 / math.sqrt(weights),
        },
        3,
    )


def ratios(products: Products, squares: Products, length: int) -> list[float]:
    """Squared lengths of all parts of the path of so many steps, each over what coefficients say."""
    starts = range(0, len(squares) - length + 1, length)
    parts = [slice(start, start + length) for start in starts]
    return [float(products[part, part].sum() / squares[part].sum()) for part in parts]


def figures(journal: Journal) -> dict[str, Any]:
    """What is recorded of a run."""
    kinds = inner_products(journal)
    products: Products = sum(part for part, _ in kinds.values())  # type: ignore[assignment]
    weights = sum(count for _, count in kinds.values())
    squares = np.array([weights * math.fsum(c * c for _, c in r.update.pairs) for r in journal.steps])
    found = {length: ratios(products, squares, length) for length in PARTS if length <= len(squares)}
    return {
        "weights": weights,
        "members": len(journal.steps[0].of_members),
        "reward": [rounded(journal.steps[at].metrics["reward"]) for at in (0, -1)],
        "squared_length_over_coefficients": {
            length: rounded({"mean": np.mean(each).item(), "min": min(each), "max": max(each)}, 6)
            for length, each in found.items()
        },
        "cosines_of_updates": cosines(products, weights),
        "cosines_by_kind": {kind: cosines(*each) for kind, each in kinds.items()},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        journal = train(Path(folder) / "run", arguments.steps, arguments.seed)
        write_result("path", {"settings": settings(arguments), **figures(journal)}, arguments.results)


if __name__ == "__main__":
    main()

"""What cumulative step-size adaptation would listen to: how much longer the path of updates is than chance has it.

    python -m bench.exactness.path [--steps 40] [--seed 0]

The embedded model learns Countdown with its own settings. Then each update is made again from seeds and coefficients,
and the inner products of all of them give the squared length of any part of the path. Cumulative step-size adaptation
compares that with what updates in independent directions would come to, which coefficients alone tell: the number of
weights times the sum of their squares. Recorded is the ratio of the two over all parts of a length that follow each
other, and the cosines between updates: one over the root of the number of weights is what independent ones have.
Nothing is timed.
"""

from __future__ import annotations

import math
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


def inner_products(journal: Journal) -> tuple[Products, int]:
    """Of all pairs of updates, `[steps][steps]`; and the number of weights."""
    base = base_checkpoint(journal.header, journal.base_model())
    found = np.zeros((len(journal.steps), len(journal.steps)))
    weights = 0
    for name in journal.header.tensors:
        count = base.tensors[name].elements
        updates = np.zeros((len(journal.steps), count))
        for row, record in enumerate(journal.steps):
            for seed, coefficient in record.update.pairs:
                updates[row] += coefficient * normal(seed, tensor_id(name), 0, count).astype(np.float64)
        found += updates @ updates.T
        weights += count
    return found, weights


def ratios(products: Products, squares: Products, length: int) -> list[float]:
    """Squared lengths of all parts of the path of so many steps, each over what coefficients say."""
    starts = range(0, len(squares) - length + 1, length)
    parts = [slice(start, start + length) for start in starts]
    return [float(products[part, part].sum() / squares[part].sum()) for part in parts]


def figures(journal: Journal) -> dict[str, Any]:
    """What is recorded of a run."""
    products, weights = inner_products(journal)
    squares = np.array([weights * math.fsum(c * c for _, c in r.update.pairs) for r in journal.steps])
    lengths = np.sqrt(np.diag(products))
    cosines = (products / np.outer(lengths, lengths))[np.triu_indices(len(lengths), 1)]
    found = {length: ratios(products, squares, length) for length in PARTS if length <= len(squares)}
    return {
        "weights": weights,
        "members": len(journal.steps[0].of_members),
        "reward": [rounded(journal.steps[at].metrics["reward"]) for at in (0, -1)],
        "squared_length_over_coefficients": {
            length: rounded({"mean": np.mean(each).item(), "min": min(each), "max": max(each)}, 6)
            for length, each in found.items()
        },
        "cosines_of_updates": rounded(
            {
                "pairs": len(cosines),
                "mean": cosines.mean().item(),
                "root_mean_square": math.sqrt((cosines**2).mean()),
                "by_chance": 1 / math.sqrt(weights),
            },
            3,
        ),
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

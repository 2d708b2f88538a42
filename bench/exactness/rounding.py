"""What rounding costs bfloat16 weights: restoring by subtraction, and updates too small to count.

    python -m bench.exactness.rounding

A million weights drawn with a spread of 0.02 (usual for a matrix of a language model), the paper's sigma and learning
rate. Nothing is timed: the figures are the same on every machine but for the draw of the weights.
"""

from typing import Any

import torch
from bench.common import options, write_result

from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Member, Update
from estune.weights.parameters import Parameter
from estune.weights.policies import PolicyName, Rounding
from estune.weights.weights import Weights

ELEMENTS, SPREAD, SIGMA, POPULATION = 1 << 20, 0.02, 0.001, 30


def drift(cycles: int) -> dict[str, float]:
    """Share of weights changed, and the size of the change, after cycles of perturb and restore in place."""
    tensor = draw()
    before = tensor.clone()
    weights = Weights([Parameter("weight", tensor)], policy="inplace")
    for seed in range(cycles):
        weights.perturb(Member(seed), SIGMA)
        weights.restore()
    change = tensor.float() - before.float()
    return {"percent changed": percent(change != 0), "rms": float(f"{change.square().mean().sqrt().item():.3g}")}


def lost(policy: PolicyName, rounding: Rounding) -> float:
    """Percent of base weights that an update leaves exactly where they were."""
    weights = Weights([Parameter("weight", draw())], policy=policy, rounding=rounding)
    before = weights.base["weight"].copy()
    weights.apply(one_update())
    return round(100 * float((weights.base["weight"] == before).mean()), 1)


def one_update() -> Update:
    strategy = EvolutionStrategy(population=POPULATION, sigma=SIGMA)
    return strategy.tell([float(i) for i in range(POPULATION)])


def draw() -> torch.Tensor:
    return (torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)) * SPREAD).bfloat16()


def percent(mask: torch.Tensor) -> float:
    return round(100 * mask.float().mean().item(), 1)


def main() -> None:
    results = options(__doc__).parse_args().results
    figures: dict[str, Any] = {
        "in place, after 1 cycle": drift(1),
        "in place, after 30 cycles": drift(30),
        "percent of weights an update leaves in place": {
            "bfloat16, to nearest": lost("copy", "nearest"),
            "bfloat16, stochastic": lost("copy", "stochastic"),
            "float32 master": lost("master", "nearest"),
        },
    }
    write_result("rounding", figures, results)


if __name__ == "__main__":
    main()

"""Parameter search inside another evolutionary system: islands that share engines, and start again from the best one.

python examples/islands.py [FOLDER]

Each island is a search of its own over the embedded model's weights, with a journal. Here the outer system lets the
worse island go after a few steps, and a new one begins where the better one is.
"""

import random
import sys
from pathlib import Path

from estune import Config, Engines, ParameterSearch

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/islands")
STEPS = 4
numbers = random.Random(0)
sums = [(numbers.randrange(20, 50), numbers.randrange(11, 20)) for _ in range(16)]
prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in sums]


def score(completions):
    """The share of right sums, half; the other half for working them out step by step, which the model seldom does."""
    right = sum(c.text.endswith(f" {a + b}.") for (a, b), c in zip(sums, completions, strict=True))
    worked = sum(c.text.startswith("Step by step:") for c in completions)
    return (right + worked) / len(sums) / 2


def evolve(island):
    """Some steps of one island; what its weights score in the end."""
    for _ in range(STEPS):
        members = island.ask()
        island.tell([score(completions) for completions in island.evaluate(members, prompts)])
    return score(island.complete(prompts))


settings = {"population": 10, "sigma": 0.024, "max_new_tokens": 48}
with Engines(Config(**settings)) as engines:
    base = ParameterSearch(engines, folder / "base")
    print(f"base: {score(base.complete(prompts)):.3f}")
    islands = [base, ParameterSearch(engines, folder / "other", seed=1)]
    scores = [evolve(island) for island in islands]
    best = islands[scores.index(max(scores))]
    heir = ParameterSearch(engines, folder / "heir", start=best)
    print(f"islands: {scores[0]:.3f} and {scores[1]:.3f}; from the better one: {evolve(heir):.3f}")
    heir.save(folder / "model")
    for island in (*islands, heir):
        island.close()

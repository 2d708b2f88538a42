"""Rollouts of one to eight turns: prompts that join and leave the batch as they come, against rounds.

    python -m bench.speed.turns [--model tiny] [--rollouts 128] [--turns 8] [--new-tokens 48]

Both are played by the same code over the same engine; only the batch differs. Rounds are `Rounds`, what engines have
that decode whole batches alone: those who wait are decoded together, to the end of the longest. Rollouts have unequal
numbers of turns, all equally frequent, and answers unequal lengths, as the model ends them. Greedy, so that both
generate the same tokens, which is checked. They take turns; rates are of the median.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from bench.common import medians, options, rounded, settings, write_result

from estune.agents.play import Limits, Players
from estune.completion import Completion, Sampling
from estune.engines.continuous import Rounds, Rows
from estune.engines.transformers import TransformersEngine
from estune.grading.rollout import Opening, Rollout


class Chat:
    """An environment that asks further questions, as many as its row says."""

    def __init__(self) -> None:
        self.left = 0

    def reset(self, row: Mapping[str, Any]) -> str:
        """As `Environment.reset`."""
        self.left = int(row["turns"])
        return str(row["prompt"])

    def step(self, completion: str) -> str | float:
        """As `Environment.step`."""
        self.left -= 1
        return f"And what is {len(completion)} plus {self.left}?" if self.left else float(len(completion))


class InRounds(TransformersEngine):
    """The engine, its batches as those of a decoder that takes whole ones alone."""

    def open_rows(self) -> Rows:
        """As `Serving.open_rows`."""
        return Rounds(self.generate)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rollouts", type=int, default=128, metavar="N", help="at once")
    parser.add_argument("--turns", type=int, default=8, metavar="N", help="at most")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sampling = Sampling(arguments.new_tokens)
    chance = random.Random(0)
    rows = [
        {"prompt": f"What is {n} plus {7 * n % 31}?", "turns": 1 + n % arguments.turns}
        for n in range(arguments.rollouts)
    ]
    chance.shuffle(rows)
    engines = {"continuous": TransformersEngine(arguments.model), "rounds": InRounds(arguments.model)}
    found: dict[str, list[Completion]] = {}

    def play(name: str) -> None:
        engine = engines[name]
        prompts = engine.encode([[{"role": "user", "content": row["prompt"]}] for row in rows])
        openings = [Opening(ids, Rollout("environment", Chat), row) for ids, row in zip(prompts, rows, strict=True)]
        players = Players(engine, engine, Limits(turns=arguments.turns))
        found[name] = players.play(openings, sampling)
        players.close()

    seconds = medians({name: lambda name=name: play(name) for name in engines}, arguments.repeats, warm_up=1)  # type: ignore[misc]
    for one, other in zip(found["continuous"], found["rounds"], strict=True):
        assert one.token_ids == other.token_ids
    lengths = [len(completion.token_ids) for completion in found["rounds"]]
    result = {
        "settings": settings(arguments),
        "tokens": sum(lengths),
        "tokens_of_a_rollout": {"least": min(lengths), "most": max(lengths)},
        "tokens_per_second": rounded({name: sum(lengths) / value for name, value in seconds.items()}),
        "ratio": rounded(seconds["rounds"] / seconds["continuous"]),
    }
    write_result(f"turns-{arguments.model}", result, arguments.results)


if __name__ == "__main__":
    main()

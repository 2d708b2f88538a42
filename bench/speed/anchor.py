"""What does `anchor_decay` cost of a step, whose update then reads the base model from its file?

    python -m bench.speed.anchor [--cases tiny:30:100 tiny:128:1 smollm2:8:24] [--repeats 20]

One engine of one thread, members one by one, or together where they have few prompts (`noise: rank1`). Updates with an
anchor and without take turns; a step is its evaluation and the update without. Processor seconds, which other work on
the machine changes less; the share is the median of the differences of pairs over the median step. The bar is 2%.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from bench.common import options, rounded, settings, write_result
from bench.speed.together import TASKS

from estune.completion import Sampling
from estune.config import load
from estune.engines.tokenizer import open_encoder
from estune.es.strategy import Member, Update
from estune.pool.replica import Replica
from estune.run.held_out import token_ids

FEW, STEPS = 8, 3


def measure(model: str, members: int, prompts: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step's evaluation and of its update, both ways."""
    noise = "rank1" if prompts < FEW else "iid"
    given = [f"model={model}", "threads=1", "replicas=1", f"noise={noise}", "anchor_decay=1", *TASKS[model]]
    config = load(None, given)
    replica = Replica(config)
    task = config.task.build(0)
    ids = token_ids(open_encoder(config), task, [task.train[i] for i in range(prompts)])
    sampling = Sampling(config.max_new_tokens)
    asked = [Member(seed) for seed in range(1, members + 1)]
    plain = Update(0, tuple(asked), tuple([1e-6] * members), 0.0, 1)
    anchored = replace(plain, anchor=1e-6)

    def evaluate() -> None:
        if noise == "rank1":
            most = replica.at_once(ids, sampling)
            for first in range(0, members, most):
                replica.take(asked[first : first + most], config.sigma)
                replica.complete_each(ids, sampling)
            return
        for member in asked:
            replica.perturb(member, config.sigma)
            replica.complete(ids, sampling)

    pairs = [(_seconds(lambda: replica.apply(plain)), _seconds(lambda: replica.apply(anchored)))
             for _ in range(repeats + 1)][1:]  # fmt: skip
    evaluation = statistics.median([_seconds(evaluate) for _ in range(STEPS + 1)][1:])
    step = evaluation + statistics.median(without for without, _ in pairs)
    differences = [anchor - without for without, anchor in pairs]
    return {
        "evaluation": evaluation,
        "update": statistics.median(without for without, _ in pairs),
        "update with an anchor": statistics.median(anchor for _, anchor in pairs),
        "share of a step": statistics.median(differences) / step,
    }


def _seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=["tiny:30:100", "tiny:128:1", "smollm2:8:24"])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for case in arguments.cases:
        model, members, prompts = case.split(":")
        name = f"{model}, {members} members x {prompts} prompts"
        found[name] = measure(model, int(members), int(prompts), arguments.repeats if model == "tiny" else 4)
        print(name, found[name], flush=True)
    write_result("anchor", {"settings": settings(arguments), **rounded(found)}, arguments.results)


if __name__ == "__main__":
    main()

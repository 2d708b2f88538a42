"""What a higher rank of the noise costs: a step's members decoded together, and the passes over a matrix.

    python -m bench.speed.ranks [--cases tiny:64:4] [--shape 1536 576] [--repeats 9]

One engine of one thread. `perturb` and `update` are over one matrix of this shape, the update by 16 members. Of a step,
`draw` makes all members' vectors and `decode` completes their prompts in one batch; beside them are members one by one
with the paper's noise, each of which is perturbed first. All take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench.common import medians, options, rounded, settings, write_result
from bench.speed.together import TASKS

from estune.completion import Sampling
from estune.config import load
from estune.engines.tokenizer import open_encoder
from estune.es.strategy import Member
from estune.es.update import Terms
from estune.noise.reference import tensor_id
from estune.noise.rows import Run
from estune.pool.replica import Replica
from estune.run.held_out import token_ids
from estune.weights import passes
from estune.weights.tensors import narrow

RANKS = (1, 2, 4, 8)
MEMBERS = 16
SIGMA = 0.01


def over_a_matrix(rows: int, columns: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of a perturbation and of an update, by the noise."""
    weights = np.random.default_rng(0).standard_normal(rows * columns, np.float32) * np.float32(0.02)
    base = narrow(weights, {"float32": "F32", "bfloat16": "BF16"}[dtype])
    key = tensor_id("matrix")
    terms = Terms(np.arange(MEMBERS, dtype=np.uint64), np.full(MEMBERS, 1e-6, np.float32), 0.0, None)
    runs = {"iid": Run(base.copy(), base, key, key)}
    runs |= {f"rank{rank}": Run(base.copy(), base, key, key, columns=columns, rank=rank) for rank in RANKS}
    work: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        work[f"perturb, {name}"] = lambda run=run: passes.perturb(run, 1, SIGMA)
        work[f"update, {name}"] = lambda run=run: passes.update(run, terms)
    return {name: 1000 * seconds for name, seconds in medians(work, repeats).items()}


def of_a_step(model: str, members: int, prompts: int, repeats: int) -> dict[str, Any]:
    """Seconds in which the members of a step are drawn and decoded, by the noise."""
    given = [f"model={model}", "threads=1", "replicas=1", *TASKS[model]]
    config = load(None, given)
    task = config.task.build(0)
    ids = token_ids(open_encoder(config), task, [task.train[i] for i in range(prompts)])
    sampling = Sampling(config.max_new_tokens)
    asked = [Member(seed) for seed in range(1, members + 1)]
    alone = Replica(load(None, [*given, "noise=iid"]))

    def one_by_one() -> None:
        for member in asked:
            alone.evaluate(member, config.sigma, ids, sampling)

    work: dict[str, Callable[[], object]] = {"iid, one by one": one_by_one}
    for rank in RANKS:
        replica = Replica(load(None, [*given, f"noise=rank{rank}"]))
        assert replica.at_once(ids, sampling) >= members
        work[f"rank{rank}: draw"] = lambda replica=replica: replica.take(asked, config.sigma)
        work[f"rank{rank}: decode"] = lambda replica=replica: replica.complete_each(ids, sampling)
    return medians(work, repeats, 1)


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=["tiny:64:4"])
    parser.add_argument("--shape", nargs=2, type=int, default=[1536, 576], help="rows and columns of the matrix")
    parser.add_argument("--repeats", type=int, default=9)
    arguments: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    rows, columns = arguments.shape
    for dtype in ("float32", "bfloat16"):
        found[f"{dtype}, milliseconds"] = over_a_matrix(rows, columns, dtype, arguments.repeats)
    for case in arguments.cases:
        model, members, prompts = case.split(":")
        name = f"{model}, {members} members x {prompts} prompts, seconds"
        found[name] = of_a_step(model, int(members), int(prompts), arguments.repeats)
        print(name, found[name], flush=True)
    write_result("ranks", {"settings": settings(arguments), **rounded(found)}, arguments.results)


if __name__ == "__main__":
    main()

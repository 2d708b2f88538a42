"""Members in one batch of vLLM's, a slot each, against members one by one: a step's evaluation, and its update.

    python -m bench.speed.vllm_slots [--cases tiny:8:20 smollm2:8:8] [--repeats 3] [--noise rank1] [--train '*']

In an environment that has vLLM. One engine; `in one batch` takes all members at once. They are those of an adapter,
where `one by one` puts each into the slot of the live weights and completes its prompts; or, with `--noise rank1`, of
the model's own weights (all, or by `--train`), where it perturbs these in place. `plain` is as many completions of the
model without slots, in batches of a member's prompts and in one, so that what these cost is seen. All take turns, and
medians are compared, of the processor's seconds: there is one thread. Completions of the two ways should agree in
float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from bench.common import medians, options, rounded, settings, write_result

from estune.completion import Sampling
from estune.config import Config, load
from estune.engines.tokenizer import open_encoder
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.internals import check_version
from estune.es.strategy import Member, Update
from estune.pool.open import with_length
from estune.pool.replica import Replica
from estune.run.held_out import token_ids
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate

TASKS = {
    "tiny": ["task.name=countdown", "dtype=float32"],
    "smollm2": ["task.name=examples/capitals.py", "max_new_tokens=16", "dtype=bfloat16"],
}
SIGMA = {"iid": 0.02, "rank1": 0.002}


def measure(model: str, members: int, prompts: int, repeats: int, sigma: float, trained: list[str]) -> dict[str, Any]:
    """Processor seconds of all members' evaluation and of their update.

    Args:
        model: which.
        members: in slots.
        prompts: of each.
        repeats: turns.
        sigma: of the members' noise.
        trained: settings that say what is trained.
    """
    given = [f"model={model}", "threads=1", "engine=vllm", "device=cpu", f"vllm_max_loras={members}", *TASKS[model]]
    config = load(None, [*given, *trained, f"batch_size={members * prompts}"])
    task = config.task.build(0)
    ids = token_ids(open_encoder(config), task, [task.train[i] for i in range(prompts)])
    config = with_length(config, max(map(len, ids)) + 1)
    sampling = Sampling(config.max_new_tokens)
    plain = _plain(config, ids, members, sampling, repeats)
    replica = Replica(config)
    asked = [Member(seed) for seed in range(1, members + 1)]
    update = Update(0, tuple(asked), tuple([1e-6] * members), 0.0, 1)

    def one_by_one() -> list[Any]:
        found = []
        for member in asked:
            replica.perturb(member, sigma)
            found.append(replica.complete(ids, sampling))
        return found

    def in_one_batch() -> list[Any]:
        replica.take(asked, sigma)
        return replica.complete_each(ids, sampling)

    pairs = [
        (a.token_ids, b.token_ids)
        for x, y in zip(in_one_batch(), one_by_one(), strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    ways = {"one by one": one_by_one, "in one batch": in_one_batch}
    seconds = medians(ways, repeats, 0, process_time)
    work = {"take": lambda: replica.take(asked, sigma), "apply": lambda: replica.apply(update)}
    writing = medians(work, repeats, 1, process_time)
    replica.engine.close()
    return {
        "tokens": sum(len(a) for a, _ in pairs),
        "tokens one by one": sum(len(b) for _, b in pairs),
        "completions alike": sum(a == b for a, b in pairs) / len(pairs),
        "processor seconds": seconds,
        "tokens a second in one batch": sum(len(a) for a, _ in pairs) / seconds["in one batch"],
        "tokens a second one by one": sum(len(b) for _, b in pairs) / seconds["one by one"],
        "times as fast as one by one": seconds["one by one"] / seconds["in one batch"],
        "processor seconds to write the slots of all members": writing["take"],
        "processor seconds of the update": writing["apply"],
        "processor seconds of the plain model": plain,
    }


def _plain(config: Config, ids: list[list[int]], members: int, sampling: Sampling, repeats: int) -> dict[str, float]:
    engine = VllmEngine(Checkpoint(locate(config.model)), config.model_copy(update={"adapter": None}))

    def batches(count: int, prompts: list[list[int]]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                engine.forget()
                engine.generate(prompts, sampling)

        return run

    # Of other beginnings for each member: it would keep what the same prompts have in common, as slots cannot.
    others = [[number, *prompt] for number in range(members) for prompt in ids]
    work = {"in batches of a member": batches(members, ids), "in one batch": batches(1, others)}
    found = medians(work, repeats, 1, process_time)
    engine.close()
    return found


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=["tiny:8:20", "smollm2:8:8"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8, help="of the adapter")
    parser.add_argument("--noise", choices=list(SIGMA), default="iid", help="rank1: of the model's own weights")
    parser.add_argument("--train", default="auto", help="`train_parameters`, with rank1")
    arguments: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    own = [f"noise={arguments.noise}", f"train_parameters={arguments.train}"]
    trained = [f"adapter.rank={arguments.rank}"] if arguments.noise == "iid" else own
    sigma = SIGMA[arguments.noise]
    found = {}
    for case in arguments.cases:
        model, members, prompts = case.split(":")
        name = f"{model}, {members} members x {prompts} prompts"
        found[name] = measure(model, int(members), int(prompts), arguments.repeats, sigma, trained)
        print(name, found[name], flush=True)
    part = "all-weights" if arguments.train == "auto" else "rank1"
    write_result(
        "vllm-slots" if arguments.noise == "iid" else f"vllm-slots-{part}",
        {"settings": settings(arguments), "vllm": check_version(), **rounded(found)},
        arguments.results,
    )


if __name__ == "__main__":
    main()

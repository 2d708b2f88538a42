"""Members of rank-one noise decoded together, against members one by one: a step's evaluation, and its update.

    python -m bench.speed.together [--cases tiny:64:4 tiny:20:20 smollm2:16:24] [--repeats 5]

One engine of one thread. `one by one` is `noise: iid`, each member's weights made and then its prompts completed; `rank
one, one by one` is the same with `noise: rank1`, as an engine without this path does it; `together` adds what members
are to a common product. `gpt2` and `gemma2` are random models of about the embedded one's size, which their own forward
decodes. Times hold the drawing of the noise. All take turns, and medians are compared; the machine's load is in the
result. Completions of the two ways with rank-one noise should agree: in float32 they do, while in bfloat16 a member's
own weights are rounded, and what is added to products is not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench.common import medians, options, rounded, settings, write_result
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from estune.completion import Sampling
from estune.config import load
from estune.engines.tokenizer import load_tokenizer, open_encoder
from estune.es.strategy import Member, Update
from estune.pool.replica import Replica
from estune.run.held_out import token_ids
from estune.weights.locate import locate

RANDOM: dict[str, Any] = {
    "gpt2": lambda vocabulary: GPT2Config(
        vocab_size=vocabulary, n_embd=128, n_layer=4, n_head=4, n_positions=512, initializer_range=0.2
    ),
    "gemma2": lambda vocabulary: Gemma2Config(
        vocab_size=vocabulary, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=384, initializer_range=0.2,
    ),
}  # fmt: skip
TASKS = {
    "tiny": ["task.name=countdown"],
    "gpt2": ["task.name=countdown", "max_new_tokens=32"],
    "gemma2": ["task.name=countdown", "max_new_tokens=32"],
    "smollm2": ["task.name=examples/capitals.py", "max_new_tokens=16", "sigma=0.004", "dtype=bfloat16"],
}


def saved(model: str, folder: Path) -> str:
    """What to give as the model: a random one is saved first, with the embedded one's tokenizer."""
    if model not in RANDOM:
        return model
    tokenizer = load_tokenizer(locate("tiny"))
    config = RANDOM[model](len(tokenizer))
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / model)
    tokenizer.save_pretrained(folder / model)
    return str(folder / model)


def measure(model: str, path: str, members: int, prompts: int, repeats: int) -> dict[str, Any]:
    """Seconds of all members' evaluation and of their update, each way."""
    given = [f"model={path}", "threads=1", "replicas=1", *TASKS[model]]
    iid, rank1 = (Replica(load(None, [*given, f"noise={noise}"])) for noise in ("iid", "rank1"))
    config = load(None, given)
    task = config.task.build(0)
    ids = token_ids(open_encoder(config), task, [task.train[i] for i in range(prompts)])
    sampling = Sampling(config.max_new_tokens)
    asked = [Member(seed) for seed in range(1, members + 1)]
    update = Update(0, tuple(asked), tuple([1e-6] * members), 0.0, 1)

    def one_by_one(replica: Replica) -> list[Any]:
        found = []
        for member in asked:
            replica.perturb(member, config.sigma)
            found.append(replica.complete(ids, sampling))
        return found

    def together() -> list[Any]:
        found = []
        most = rank1.at_once(ids, sampling)
        for first in range(0, members, most):
            rank1.take(asked[first : first + most], config.sigma)
            found += rank1.complete_each(ids, sampling)
        return found

    pairs = [
        (a.token_ids, b.token_ids)
        for x, y in zip(together(), one_by_one(rank1), strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    evaluation = {
        "one by one": lambda: one_by_one(iid),
        "rank one, one by one": lambda: one_by_one(rank1),
        "together": together,
    }
    seconds = medians(evaluation, repeats, 1)
    updates = medians({"iid": lambda: iid.apply(update), "rank one": lambda: rank1.apply(update)}, repeats, 1)
    return {
        "members at once": rank1.at_once(ids, sampling),
        "completions alike": sum(a == b for a, b in pairs) / len(pairs),
        "seconds": seconds,
        "seconds of the update": updates,
        "times as fast as one by one": seconds["one by one"] / seconds["together"],
        "update, times as fast": updates["iid"] / updates["rank one"],
        "whole, times as fast": (seconds["one by one"] + updates["iid"]) / (seconds["together"] + updates["rank one"]),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=["tiny:64:4", "tiny:20:20", "smollm2:16:24"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for case in arguments.cases:
        model, members, prompts = case.split(":")
        name = f"{model}, {members} members x {prompts} prompts"
        with tempfile.TemporaryDirectory() as folder:
            path = saved(model, Path(folder))
            found[name] = measure(model, path, int(members), int(prompts), arguments.repeats)
        print(name, found[name], flush=True)
    write_result("together", {"settings": settings(arguments), **rounded(found)}, arguments.results)


if __name__ == "__main__":
    main()

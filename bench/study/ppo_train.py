"""PPO itself, by the last TRL whose trainer takes rewards as numbers: the other side of `bench.study.ppo`.

Runs in an environment of its own, which that module names, and imports nothing of estune. Over two pipes it is told
what to do, and asks what completions are worth, a JSON line each.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any


def main() -> None:
    """Train until the other side says that it is enough."""
    answers = os.fdopen(os.dup(sys.stdin.fileno()))
    asks = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to the log
    given = json.loads(answers.readline())

    def ask(**what: Any) -> Any:
        print(json.dumps(what), file=asks)
        return json.loads(answers.readline())

    train(given, ask)


def train(given: dict[str, Any], ask: Any) -> None:
    """PPO by TRL's defaults, but for batch and rate, and without a KL penalty, as all methods of the study."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed

    torch.set_num_threads(1)
    set_seed(given["seed"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given["model"], padding_side="left")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(given["model"], torch_dtype=torch.float32)
    arguments = PPOConfig(
        seed=given["seed"], learning_rate=given["rate"], batch_size=given["batch"], mini_batch_size=given["batch"],
        init_kl_coef=0.0, adap_kl_ctrl=False,
    )  # fmt: skip
    trainer = PPOTrainer(arguments, model, tokenizer=tokenizer)
    sampling = {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": given["max_new_tokens"],
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    wall, computed = 0.0, 0.0
    for rows in batches(len(given["prompts"]), given["batch"], given["seed"]):
        clocks = time.perf_counter(), time.process_time()
        queries = [torch.tensor(given["prompts"][row]) for row in rows]
        inputs = tokenizer.pad({"input_ids": queries}, return_tensors="pt")
        with torch.no_grad():
            drawn = model.generate(**inputs, **sampling)[:, inputs["input_ids"].shape[1] :]
        completions = [until(row, tokenizer.eos_token_id) for row in drawn.tolist()]
        rewards = ask(rows=rows, completions=completions)
        trainer.step(queries, [torch.tensor(c) for c in completions], [torch.tensor(float(r)) for r in rewards])
        wall += time.perf_counter() - clocks[0]
        computed += time.process_time() - clocks[1]
        told = ask(seconds=wall, cpu_seconds=computed)
        if told["save"]:
            model.pretrained_model.save_pretrained(told["save"])
            ask(saved=True)
        if told["stop"]:
            return


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rows in batches, shuffled anew each time that all have been seen."""
    drawn = random.Random(seed)
    left: list[int] = []
    while True:
        if len(left) < size:
            left = drawn.sample(range(count), count)
        yield left[:size]
        left = left[size:]


def until(ids: Sequence[int], end: int) -> list[int]:
    """Token ids up to the end token, which belongs to them."""
    return list(ids[: ids.index(end) + 1]) if end in ids else list(ids)


if __name__ == "__main__":
    main()

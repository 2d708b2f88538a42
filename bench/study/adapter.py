"""What an adapter learns of a real model, for several run seeds; and that PEFT alone answers as the run does.

    python -m bench.study.adapter [--seeds 3] -- --config examples/capitals.yaml --adapter.rank 8

Runs are measured as by `bench.study.train`. Then the first one's checkpoint after the last step answers five held-out
questions, by the largest logits in float32: as PEFT loads it over its base model, by `generate`, and by estune.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from bench.common import options, write_result
from bench.study.train import run

from estune.completion import Sampling
from estune.config import load
from estune.engines.tokenizer import open_encoder
from estune.engines.transformers import TransformersEngine
from estune.run.held_out import token_ids
from estune.weights.locate import locate

ASKED = 5


def answers(output: Path) -> dict[str, list[str]]:
    """What the adapter of a run answers to held-out questions, by PEFT and by estune."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = load(output / "config.yaml")
    task = config.task.build(config.seed)
    prompts = token_ids(open_encoder(config), task, [task.evaluation[i] for i in range(ASKED)])
    engine = TransformersEngine(output / "final", dtype="float32")
    ours = engine.generate(prompts, Sampling(config.max_new_tokens))
    base = AutoModelForCausalLM.from_pretrained(locate(config.model), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, output / "final").eval()
    theirs = [
        plain.generate(torch.tensor([prompt]), max_new_tokens=config.max_new_tokens, do_sample=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    read = engine.tokenizer
    return {
        "estune": [each.text for each in ours],
        "PEFT": [read.decode(row, skip_special_tokens=True) for row in theirs],
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("settings", nargs="+", help="of the job, after `--`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(seed, Path(folder), arguments.settings) for seed in range(arguments.seeds)]
        said = answers(Path(folder) / "0")
    first = [next(iter(each["accuracy"].values())) for each in runs]
    last = [list(each["accuracy"].values())[-1] for each in runs]
    figures = {
        "accuracy before": round(statistics.mean(first), 4),
        "accuracy after": round(statistics.mean(last), 4),
        "standard deviation of accuracy after": round(statistics.stdev(last), 4) if len(last) > 1 else 0.0,
        "processor seconds": round(statistics.mean(each["processor seconds"] for each in runs), 1),
        "peak GiB": max(each["peak GiB"] for each in runs),
        "tokens": round(statistics.mean(each["tokens"] for each in runs)),
        "runs": runs,
        "answers alike": sum(map(str.__eq__, said["PEFT"], said["estune"])),
        "answers": said,
    }
    write_result("adapter-capitals", figures, arguments.results)


if __name__ == "__main__":
    main()

"""Make the embedded model: `python -m recipes.tiny [--output DIR]`, half an hour on one CPU core."""

import argparse
from pathlib import Path

import torch
from recipes.tiny import tokenizer, train
from transformers import AutoTokenizer, Qwen2ForCausalLM

PACKAGED = Path(__file__).parents[2] / "src" / "estune" / "models" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.tiny", description="Pretrain the embedded model.")
    parser.add_argument("--output", type=Path, default=PACKAGED, help="where the checkpoint goes (the package)")
    parser.add_argument(
        "--skill-output", type=Path, default=Path("runs/tiny-skill"), help="the first phase's checkpoint"
    )
    parser.add_argument("--skill", type=Path, help="a first phase's checkpoint, to run only the second phase from it")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, corpus and noise")
    options = parser.parse_args()

    # One thread: the sums of a matrix product depend on how it is shared out.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    if options.skill:
        words = AutoTokenizer.from_pretrained(options.skill)
        model = Qwen2ForCausalLM.from_pretrained(options.skill, dtype=torch.float32)
    else:
        words = tokenizer.build(options.seed)
        model = train.new_model(words)
        train.train(model, words, train.SKILL, options.seed, options.skill_output)
    train.train(model, words, train.HABIT, options.seed + 1, options.output)
    generator = torch.Generator().manual_seed(options.seed + 2)
    print(*train.report(model, words, (0.0, 0.01, 0.015, 0.02), generator), sep="\n")


if __name__ == "__main__":
    main()

"""Make the model of `recipes/squares.yaml`: `python -m recipes.squares [--output DIR]`, 121 steps of gradients."""

import argparse
from pathlib import Path

import transformers
from recipes.squares.model import make


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.squares", description="Make a model that begins to see.")
    parser.add_argument("--output", type=Path, default=Path("runs/squares-model"), help="where the checkpoint goes")
    parser.add_argument("--accuracy", type=float, default=0.35, help="share of right answers at which gradients end")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(make(options.output, options.accuracy))


if __name__ == "__main__":
    main()

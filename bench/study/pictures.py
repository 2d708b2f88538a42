"""A tiny vision-language model learns to count squares: supervised until it begins to see, then by ES.

    python -m bench.study.pictures [--model DIR] [--seeds N] [KEY=VALUE ...]

The model is made as `recipes/squares` says: a LLaVA of 0.2 million parameters, trained with gradients until it is right
about one time in three. Then estune trains it by `recipes/squares.yaml`, with evaluation on 300 pictures that neither
saw. By default its language model alone is trained, for what it does with what it is shown; `train_parameters=*` trains
the eye too.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from bench.common import options, write_result
from recipes.squares.model import make

from estune import Trainer
from estune.config import load
from estune.journal.journal import Journal

RECIPE = Path(__file__).parents[2] / "recipes" / "squares.yaml"


def train(model: Path, output: Path, seed: int, settings: list[str]) -> dict[str, Any]:
    """One run, and its figures."""
    own = [f"model={model}", f"output_dir={output}", f"seed={seed}", "report_to="]
    config = load(RECIPE, overrides=[*own, *settings])
    start = time.perf_counter()
    Trainer(config, monitors=[]).train()
    journal = Journal.read(output)
    accuracy = {str(e.step): round(e.metrics["eval_accuracy"], 4) for e in journal.evaluations}
    found = {"seconds": round(time.perf_counter() - start, 1), "accuracy after step": accuracy}
    print(seed, found, flush=True)
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, help="where the model is kept, and taken from if it is there")
    parser.add_argument("--warm", type=float, default=0.35, help="share of right answers at which gradients end")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the runs")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or Path(folder) / "model"
        figures = {} if (path / "config.json").is_file() else make(path, arguments.warm)
        print(figures, flush=True)
        for seed in range(arguments.seeds):
            figures[f"seed {seed}"] = train(path, Path(folder) / str(seed), seed, arguments.settings)
    write_result("pictures", figures, arguments.results)


if __name__ == "__main__":
    main()

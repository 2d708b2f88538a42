"""What each part of the strategy brings: learning curves on three models, beside reinforcement learning's.

    python -m bench.study.compare models        first: pretrain the small ones
    python -m bench.study.parts [--models a,b] [--settings paper,larger] [--methods grpo,rloo] [--seeds 3]

The tasks and the budget are those of `bench.study.compare`; so are the learning rates of reinforcement learning, the
best of its trials there. Settings of ES were tried on the embedded model with seeds 1000 and 1001, and are judged here
on others. A curve has 20 points, evaluated greedily on 400 held-out problems once the run is over. Results are
`parts-MODEL.jsonl`, a line a run; what is there is not run again. The page of the study draws them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.common import RESULTS, machine
from bench.study.compare import COUNTDOWN, model_and_task

from estune.config import load
from estune.study.compare.plan import Plan, best_tried, read_results
from estune.study.compare.run import compare

FOLDER = Path("runs/study/parts")
BUDGET, POINTS, TOKENS = 200_000, 20, 20.4  # to generate, and of a completion, about
METHODS = ("grpo", "dr_grpo", "dapo", "rloo")
PAPER = {"population": 20, "prompts_per_step": 20, "sigma": 0.024, "learning_rate": 0.012}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mirrored": {"mirrored": True},
    "ranks": {"shaping": "centered_ranks"},
    "elite": {"shaping": "elite"},
    "winsorized": {"shaping": "winsorized"},
    "raw": {"shaping": "raw", "learning_rate": 0.06},
    "standardized prompts": {"per_prompt": "standardize"},
    "momentum": {"momentum": 0.5},
    "reuse": {"momentum": 0.5, "momentum_window": 1},
    "anchor": {"anchor_decay": 2.0},
    "one fifth": {"adapt_sigma": True, "learning_rate": None},
    "cosine": {"lr_scheduler_type": "cosine"},
    "double alpha": {"learning_rate": 0.024},
    "larger": {"population": 40, "prompts_per_step": 10, "learning_rate": 0.024},
    "larger, cosine": {
        "population": 40, "prompts_per_step": 10, "learning_rate": 0.036, "lr_scheduler_type": "cosine",
    },
    "groups": {
        "population": 40, "prompts_per_step": 10, "prompt_groups": 4, "per_prompt": "center", "learning_rate": 0.024,
    },
}  # fmt: skip


def rates(model: str, results: Path) -> dict[str, float]:
    """The best learning rate of each method in the comparison."""
    lines = [json.loads(line) for line in (results / f"study-{model}.jsonl").read_text().splitlines()]
    found = {method: best_tried(method, [r for r in lines if r["budget"] == BUDGET]) for method in METHODS}
    return {method: rate for method, rate in found.items() if rate is not None}


def run(model: str, name: str, changes: dict[str, Any], plan: Plan, results: Path) -> None:
    """One comparison of a single method, and its results so far in the file of the model."""
    settings = {**PAPER, **changes}
    per_step = settings["population"] * settings["prompts_per_step"] * TOKENS
    settings["steps"] = round(plan.budget / per_step)
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    folder = FOLDER / model / name.replace(" ", "-").replace(",", "")
    compare(plan, load(None, [*model_and_task(model), *given]), folder, lambda r: print(name, _shown(r), flush=True))
    with (results / f"parts-{model}.jsonl").open("w") as file:
        for each in sorted((FOLDER / model).iterdir()):
            common = {"experiment": model, "settings": each.name, "machine": machine()}
            file.writelines(f"{json.dumps({**common, **result})}\n" for result in read_results(each))


def _shown(result: dict[str, Any]) -> str:
    return f"{result.get('accuracy')} after {result.get('tokens')} tokens, {result.get('seconds')} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(COUNTDOWN))
    parser.add_argument("--settings", default=";".join(SETTINGS), help="of ES, with semicolons between")
    parser.add_argument("--methods", default="", help="of reinforcement learning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    seeds = list(range(arguments.seeds))
    common: dict[str, Any] = {"budget": BUDGET, "seeds": seeds, "points": POINTS, "batch": 128}
    for model in arguments.models.split(","):
        for name in filter(None, arguments.settings.split(";")):
            plan = Plan(methods=["es"], **common)
            run(model, name, SETTINGS[name], plan, arguments.results)
        for method in filter(None, arguments.methods.split(",")):
            plan = Plan(methods=[method], rates=[rates(model, arguments.results)[method]], **common)
            run(model, method, {}, plan, arguments.results)


if __name__ == "__main__":
    main()

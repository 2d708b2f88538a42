"""What each part of the strategy brings: learning curves on three models, beside reinforcement learning's.

    python -m bench.study.compare models        first: pretrain the small ones
    python -m bench.study.parts [--models a,b] [--settings 'paper;momentum'] [--methods grpo,rloo] [--seeds 0,1,2]

The tasks and the budget are those of `bench.study.compare`; so are the learning rates of reinforcement learning, the
best of its trials there. Settings of ES were tried on the embedded model with seeds 1000 and 1001, and are judged here
on others. A curve has 20 points, evaluated greedily on 400 held-out problems once the run is over. Results are
`parts-MODEL.jsonl`, a line a run; what is there is not run again. The page of the study draws them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench.common import RESULTS, machine, read_lines
from bench.study.compare import COUNTDOWN, WIDE, WIDER, model_and_task
from bench.study.real import at_equal_time

from estune.charts.table import markdown, spread
from estune.config import load
from estune.files import write_text
from estune.study.compare.plan import Plan, best_tried, read_results
from estune.study.compare.report import NAMES
from estune.study.compare.run import compare

FOLDER = Path("runs/study/parts")
AGAIN = "again"  # a folder among the results, of the whole once more
BUDGET, POINTS, TOKENS = 200_000, 20, 18.5  # to generate, and of a completion, about
SHORTER = {"cosine": 15.0}  # tokens of a completion by these settings, which make a schedule come to its end
SETTLED = 3  # runs of a row from which on its best point counts as what there is to be had
EMBEDDINGS = {"train_parameters": "*embed_tokens*"}  # the output matrix too: the models have one for both
FASTER = ("1e-4", "3e-4", "1e-3", "3e-3")  # larger rates than the best at the end, which may be faster at first
LONGER = 500_000  # what ES generates in the processor seconds in which reinforcement learning generates the budget
MOMENTS = (3, 5, 10, 20, 40, 80)  # processor seconds at which ES and reinforcement learning are compared
COMPARED = ("paper", "128 members, 1 prompt, smaller sigma", "128 members, 1 prompt, embeddings alone")  # of ES there
ALONE = "-embeddings-alone"  # at the end of a method's name
METHODS = ("grpo", "dr_grpo", "dapo", "rloo")
TOGETHER: dict[str, Any] = {
    "noise": "rank1", "population": 128, "prompts_per_step": 1, "prompt_groups": 4, "per_prompt": "center",
    "learning_rate": 0.08, "anchor_decay": 1.0, "lr_scheduler_type": "cosine", **EMBEDDINGS,
}  # fmt: skip
PAPER = {"population": 20, "prompts_per_step": 20, "sigma": 0.024, "learning_rate": 0.012}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "rank one": {"noise": "rank1"},
    "rank four": {"noise": "rank4"},
    "mirrored": {"mirrored": True},
    "ranks": {"shaping": "centered_ranks"},
    "elite": {"shaping": "elite"},
    "winsorized": {"shaping": "winsorized"},
    "raw": {"shaping": "raw", "learning_rate": 0.06},
    "standardized prompts": {"per_prompt": "standardize"},
    "momentum": {"momentum": 0.5},
    "reuse": {"momentum": 0.5, "momentum_window": 1},
    "anchor": {"anchor_decay": 2.0},
    "anchor by L1": {"anchor_l1": 0.02},
    "weight decay": {"weight_decay": 0.5},
    "one fifth": {"adapt_sigma": True, "learning_rate": None},
    "cosine": {"lr_scheduler_type": "cosine"},
    "double alpha": {"learning_rate": 0.024},
    "double alpha, guarded": {"learning_rate": 0.024, "guard": 0.5},
    "40 members": {"population": 40, "prompts_per_step": 10, "learning_rate": 0.024},
    "40 members, 4 prompts": {"population": 40, "prompts_per_step": 4, "learning_rate": 0.012},
    "15 members, 27 prompts": {"population": 15, "prompts_per_step": 27},
    "15 members, 27 prompts, alpha by N": {"population": 15, "prompts_per_step": 27, "learning_rate": 0.008485},
    "60 members, 7 prompts": {"population": 60, "prompts_per_step": 7},
    "60 members, 7 prompts, alpha by N": {"population": 60, "prompts_per_step": 7, "learning_rate": 0.016971},
    "40 members, 4 prompts, large steps": {
        "population": 40, "prompts_per_step": 4, "learning_rate": 0.03, "lr_scheduler_type": "cosine",
    },
    "groups": {
        "population": 40, "prompts_per_step": 4, "prompt_groups": 4, "per_prompt": "center", "learning_rate": 0.03,
        "lr_scheduler_type": "cosine",
    },
    "128 members, 1 prompt": {
        "noise": "rank1", "population": 128, "prompts_per_step": 1, "prompt_groups": 4, "per_prompt": "center",
        "learning_rate": 0.06, "anchor_decay": 1.0, "lr_scheduler_type": "cosine",
    },
    "128 members, 1 prompt, smaller sigma": {
        "noise": "rank1", "population": 128, "prompts_per_step": 1, "prompt_groups": 4, "per_prompt": "center",
        "sigma": 0.018, "learning_rate": 0.08, "anchor_decay": 1.0, "lr_scheduler_type": "cosine",
    },
    "128 members, 1 prompt, small sigma": {
        "noise": "rank1", "population": 128, "prompts_per_step": 1, "prompt_groups": 4, "per_prompt": "center",
        "sigma": 0.014, "learning_rate": 0.08, "anchor_decay": 1.0, "lr_scheduler_type": "cosine",
    },
    "128 members, 1 prompt, embeddings alone": TOGETHER,
    "128 members, 1 prompt, embeddings alone, smaller sigma": {**TOGETHER, "sigma": 0.018},
    "128 members, 1 prompt, matrices of layers alone": {**TOGETHER, "train_parameters": "*_proj.weight"},
    "together, one group": {**TOGETHER, "prompt_groups": 1},
    "together, not centred": {**TOGETHER, "per_prompt": "none"},
    "together, no anchor": {**TOGETHER, "anchor_decay": 0.0},
    "together, constant rate": {**TOGETHER, "lr_scheduler_type": "constant"},
    "together, 32 members of 4 prompts": {**TOGETHER, "population": 32, "prompts_per_step": 4, "learning_rate": 0.04},
    "together, full noise": {**TOGETHER, "noise": "iid"},
    "together, mirrored": {**TOGETHER, "mirrored": True},
    "together, standardized": {**TOGETHER, "per_prompt": "standardize"},
    "together, momentum": {**TOGETHER, "momentum": 0.5},
    "embeddings alone": EMBEDDINGS,
    "embeddings alone, rank one": {**EMBEDDINGS, "noise": "rank1"},
    "embeddings alone, mirrored": {**EMBEDDINGS, "mirrored": True},
    "embeddings alone, ranks": {**EMBEDDINGS, "shaping": "centered_ranks"},
    "embeddings alone, standardized prompts": {**EMBEDDINGS, "per_prompt": "standardize"},
    "embeddings alone, momentum": {**EMBEDDINGS, "momentum": 0.5},
    "embeddings alone, anchor": {**EMBEDDINGS, "anchor_decay": 2.0},
    "embeddings alone, cosine": {**EMBEDDINGS, "lr_scheduler_type": "cosine"},
    "embeddings alone, double alpha": {**EMBEDDINGS, "learning_rate": 0.024},
    "embeddings alone, double alpha, cosine": {
        **EMBEDDINGS, "learning_rate": 0.024, "lr_scheduler_type": "cosine",
    },
    "embeddings alone, groups": {
        **EMBEDDINGS, "population": 40, "prompts_per_step": 4, "prompt_groups": 4, "per_prompt": "center",
        "learning_rate": 0.03, "lr_scheduler_type": "cosine",
    },
    "128 members, 1 prompt, small sigma, for conciseness": {
        "noise": "rank1", "population": 128, "prompts_per_step": 1, "prompt_groups": 4, "per_prompt": "center",
        "sigma": 0.012, "learning_rate": 0.06, "anchor_decay": 0.3, "lr_scheduler_type": "cosine",
    },
    "256 members, 1 prompt, for conciseness": {
        "noise": "rank1", "population": 256, "prompts_per_step": 1, "prompt_groups": 8, "per_prompt": "center",
        "sigma": 0.012, "learning_rate": 0.06, "anchor_decay": 0.3, "lr_scheduler_type": "cosine",
    },
    "KL at most 0.1": {"constraint": "kl<=0.1"},
    "95% right at least": {"constraint": "rewards/correct_reward/mean>=0.95"},
    "adam": {"adam": True},
    "sigma by rms": {"sigma_scale": '{"*": "rms"}', "sigma": 0.032, "learning_rate": 0.016},
    "guided": {"guided_share": 0.5},
    "sharpness-aware": {"sam_rho": 0.1},
    "mlp at half sigma": {"sigma_scale": '{"*.mlp.*": 0.5}', "learning_rate": 0.016},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, exact in place": {"dtype": "bfloat16", "weights": "exact_inplace"},
}  # fmt: skip


def rates(model: str, results: Path) -> dict[str, float]:
    """The best learning rate of each method in the comparison; for the wider task that of the usual one."""
    model = model.removesuffix(WIDER)
    lines = read_lines(results / f"study-{model}.jsonl")
    found = {method: best_tried(method, [r for r in lines if r["budget"] == BUDGET]) for method in METHODS}
    return {method: rate for method, rate in found.items() if rate is not None}


def run(model: str, name: str, changes: dict[str, Any], plan: Plan, results: Path) -> None:
    """One comparison of a single method, and its results so far in the file of the model."""
    settings = {**PAPER, **changes}
    if "lr_scheduler_type" in settings:
        per_step = settings["population"] * settings["prompts_per_step"] * SHORTER.get(name, TOKENS)
        plan = plan.model_copy(update={"es_steps": round(plan.budget / per_step)})
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    parent = FOLDER if plan.budget == BUDGET else FOLDER.with_name(f"{FOLDER.name}-{plan.budget}")
    folder = parent / model / _folder(name)
    compare(plan, load(None, [*model_and_task(model), *given]), folder, lambda r: print(name, _shown(r), flush=True))
    common = {"experiment": model, "settings": folder.name, "machine": machine()}
    collect(results / f"{parent.name}-{model}.jsonl", common, read_results(folder))


def collect(path: Path, common: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Put the results of some settings into the file; lines of other settings and other jobs stay as they are."""
    there = read_lines(path)
    lines = {(line["settings"], json.dumps(line["job"])): line for line in there}
    for result in results:
        key = (common["settings"], json.dumps(result["job"]))
        if not result.items() <= lines.get(key, {}).items():
            lines[key] = {**common, **result}
    write_text(path, "".join(f"{json.dumps(lines[key])}\n" for key in sorted(lines)))


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Of some seeds' curves, at equal distances; between two points of a run it is taken to go evenly.

    Processor seconds are those of the runs that have them.
    """
    found: list[dict[str, float]] = [{"tokens": BUDGET * k / POINTS} for k in range(POINTS + 1)]
    for what in ("accuracy", "cpu_seconds"):
        known = [curve for curve in curves if what in curve[0]]
        for point in found if known else ():
            at = [np.interp(point["tokens"], [p["tokens"] for p in curve], [p[what] for p in curve]) for curve in known]
            point[what] = statistics.fmean(map(float, at))
    return found


def cost_to(curve: Sequence[Mapping[str, float]], share: float, top: float, what: str = "tokens") -> float | None:
    """What a curve takes to a share of the gain that is to be had, from the base to `top`; None if it never does."""
    goal = curve[0]["accuracy"] + share * (top - curve[0]["accuracy"])
    for before, after in pairwise(curve):
        if after["accuracy"] >= goal:
            part = (goal - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[what] + part * (after[what] - before[what])
    return None


def best_of(runs: Mapping[str, Sequence[Any]], means: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """The best point of any mean curve of `SETTLED` runs and more, as that of fewer is chance's; or of all curves."""
    settled = [curve for name, curve in means.items() if len(runs[name]) >= SETTLED] or means.values()
    return max(point["accuracy"] for curve in settled for point in curve)


def area(curve: Sequence[Mapping[str, float]]) -> float:
    """Mean accuracy over the tokens of a run: the area under its curve."""
    parts = [(b["tokens"] - a["tokens"]) * (a["accuracy"] + b["accuracy"]) / 2 for a, b in pairwise(curve)]
    return math.fsum(parts) / curve[-1]["tokens"]


def by_name(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs that came to their end, by the name of their settings or method."""
    names = {_folder(name): name for name in SETTINGS} | NAMES | {"ppo": "PPO"}
    faster = {
        f"{method}@{rate}{part}": f"{NAMES[method]}, {rate}{', embeddings alone' * bool(part)}"
        for method in METHODS
        for rate in FASTER
        for part in ("", ALONE)
    }
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if "curve" in result and not result["job"]["trial"]:
            runs.setdefault((names | faster)[result["settings"]], []).append(result)
    return runs


def table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row a setting or method, those that get to 90% of the gain with the fewest tokens first; means over seeds.

    The gain that is to be had is `best_of`'s.
    """
    runs = by_name(results)
    means = {name: mean_curve([r["curve"] for r in of]) for name, of in runs.items()}
    top = best_of(runs, means)

    def cell(name: str, share: float, what: str, by: float = 1.0, digits: int = 0) -> str:
        if what not in means[name][0]:
            return ""  # older runs have no processor seconds
        value = cost_to(means[name], share, top, what)
        return "never" if value is None else f"{value / by:.{digits}f}"

    rows = sorted(runs.items(), key=lambda row: cost_to(means[row[0]], 0.9, top) or math.inf)
    head = ["", "runs", "1,000 tokens to 50%", "to 90%", "processor seconds to 90%", "area %", "best %", "at the end %"]
    return [
        head,
        *(
            [
                name,
                str(len(of)),
                cell(name, 0.5, "tokens", 1000),
                cell(name, 0.9, "tokens", 1000),
                cell(name, 0.9, "cpu_seconds", digits=1),
                spread([100 * area(r["curve"]) for r in of], 1),
                spread([100 * max(p["accuracy"] for p in r["curve"]) for r in of], 1),
                spread([100 * r["curve"][-1]["accuracy"] for r in of], 1),
            ]
            for name, of in rows
        ),
    ]


def section(results: Path) -> str:
    """The page's part about them."""
    found = [
        "## The strategy's parts",
        "Of the mean curve of a row's runs, tokens to 50% and 90% of the gain that is to be had, from the base to\n"
        f"the best point of any mean curve of {SETTLED} runs and more, and processor seconds; and the area under the\n"
        "curve of held-out accuracy over tokens. `paper` is 20 members, 20 prompts, sigma 0.024, alpha 0.012; every\n"
        "other row of ES changes what its name says (`bench.study.parts` has the values); `together` is 128 members\n"
        "of a prompt with embeddings alone, but for that. Processor seconds are missing where runs are older than\n"
        "their count. The two smaller models were pretrained anew for this, so that they begin elsewhere than above.\n"
        "The second table of a model is accuracy in percent at equal processor seconds; a run that is over sooner has\n"
        "its end's.",
    ]
    found += _curves(results, "")
    found += [
        "### As long as reinforcement learning",
        f"ES with {LONGER:,} tokens, for which it takes about as long as reinforcement learning takes for {BUDGET:,}.\n"
        "Processor seconds are of training alone.",
        markdown(longer(results)),
    ]
    return "\n\n".join(found)


def again(results: Path) -> list[str]:
    """The page's part about the runs that were made once more, if there are any."""
    found = _curves(results / AGAIN, ", again")
    return found and [
        "## The strategy's parts, again",
        "The same on another processor, and on the models of the first tables: made once more by their recipe on such\n"
        "a processor, they come out the same to the bit, as far as runs tell. Of 15 runs by the paper's settings\n"
        "seven agree with those there in every digit, the others in accuracy within 1.25 points, as decoding rounds\n"
        "otherwise since. Rows of embeddings alone with another part are pairs, as are those of `together`, which add\n"
        "one or change it. All seconds here are of this processor, with one other run beside.",
        *found,
    ]


def _curves(results: Path, title: str) -> list[str]:
    """For each model its rows, and what the main ones have after equal seconds."""
    found = []
    for model in (*COUNTDOWN, *WIDE):
        if lines := read_lines(results / f"parts-{model}.jsonl"):
            learning = by_name([line for line in lines if line["job"]["method"] != "es"])
            compared = {name: of for name, of in by_name(lines).items() if name in (*COMPARED, *learning)}
            found += [f"### {model}, curves{title}", markdown(table(lines))]
            found += [markdown(at_equal_time(compared, MOMENTS))]
    return found


def longer(results: Path) -> list[list[str]]:
    """ES with the longer budget, and reinforcement learning with its own; means over the runs that were timed."""
    rows = []
    for model in COUNTDOWN:
        runs = by_name(read_lines(results / f"parts-{LONGER}-{model}.jsonl"))
        learning = [line for line in read_lines(results / f"parts-{model}.jsonl") if line["job"]["method"] != "es"]
        for name, of in (runs | by_name(learning)).items() if runs else ():
            timed = [run for run in of if run.get("cpu_seconds")]
            if not timed:
                continue
            means = [statistics.fmean(run[what] for run in timed) for what in ("tokens", "cpu_seconds")]
            end = spread([100 * run["accuracy"] for run in timed], 1)
            rows.append([model, name, str(len(timed)), f"{means[0] / 1000:.0f}", f"{means[1]:.0f}", end])
    return [["", "", "runs", "1,000 tokens", "processor seconds", "at the end %"], *rows]


def _folder(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def _shown(result: dict[str, Any]) -> str:
    return f"{result.get('accuracy')} after {result.get('tokens')} tokens, {result.get('seconds')} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(COUNTDOWN))
    parser.add_argument("--settings", default=";".join(SETTINGS), help="of ES, with semicolons between")
    parser.add_argument(
        "--methods", default="", help=f"of reinforcement learning; grpo@1e-4 at that rate, and grpo@1e-4{ALONE}"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"{LONGER} beside RL's {BUDGET}: of about its time")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--again", action="store_true", help=f"into DIR/{AGAIN}: with models pretrained anew, or on another machine"
    )
    arguments = parser.parse_args()
    results = arguments.results / AGAIN if arguments.again else arguments.results
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    common: dict[str, Any] = {"budget": arguments.budget, "seeds": seeds, "points": POINTS, "batch": 128}
    for model in arguments.models.split(","):
        for name in filter(None, arguments.settings.split(";")):
            plan = Plan(methods=["es"], **common)
            run(model, name, SETTINGS[name], plan, results)
        for method in filter(None, arguments.methods.split(",")):
            name, _, rate = method.removesuffix(ALONE).partition("@")
            plan = Plan(methods=[name], rates=[float(rate or rates(model, arguments.results)[name])], **common)
            run(model, method, EMBEDDINGS if method.endswith(ALONE) else {}, plan, results)


if __name__ == "__main__":
    main()

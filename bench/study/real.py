"""A real pretrained model, SmolLM2-135M-Instruct: ES against reinforcement learning on two tasks.

    python -m bench.study.real [--experiments capitals,conciseness] [--methods 'es,es:96 members,grpo,dr_grpo,rloo']
        [--seeds 3] [--rates 3e-6,1e-5,3e-5,1e-4,3e-4]

ES has the paper's method with 16 members of 24 prompts, as `recipes/conciseness-smollm2.yaml`, with normal noise;
`es:96 members` has the settings of `examples/capitals.yaml`, and `OTHERS` is all of them. Each method of reinforcement
learning has the best of some learning rates, tried on a seed of its own if there is more than one. Every run may
generate the same number of tokens. What is measured of a trained model beside a comparison's figures: accuracy and
pass@k of 16 samples a prompt, and the accuracy on tasks that it was not trained for. It takes hours; what is among the
results is not run again. They are `real-EXPERIMENT.jsonl`, a line a run, `base` for the model itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench.common import RESULTS, machine, read_lines

from estune.charts.table import markdown, spread
from estune.config import Config, load
from estune.engines.tokenizer import open_encoder
from estune.engines.transformers import TransformersEngine
from estune.files import write_text
from estune.run.held_out import HeldOut
from estune.study.compare.plan import Job, Plan
from estune.study.compare.report import NAMES
from estune.study.compare.run import compare
from estune.weights.locate import locate

FOLDER = Path("runs/study/real")
METHODS = ("es", "grpo", "dr_grpo", "rloo")
MANY = (
    "noise=rank1", "population=96", "prompts_per_step=4", "prompt_groups=4", "per_prompt=center", "learning_rate=0.02",
    "anchor_decay=0.3",
)  # fmt: skip
# ES with other settings, `es:NAME` among the methods. Sigma is what `estune probe` keeps most of the base at.
OTHERS = {
    "": (),
    "96 members": (*MANY, "sigma=0.004"),
    "96 members sampled": (*MANY, "sigma=0.004", "temperature=1"),  # as reinforcement learning's completions
    "96 members and ten times the tokens": (*MANY, "sigma=0.004"),  # still less time than reinforcement learning's
    "96 members three times the tokens cosine": (
        *MANY,
        "sigma=0.004",
        "anchor_decay=1",
        "lr_scheduler_type=cosine",
    ),
    "384 members of a prompt": (  # as many completions a step
        *MANY,
        "sigma=0.004",
        "population=384",
        "prompts_per_step=1",
        "prompt_groups=8",
        "learning_rate=0.04",
    ),
    "96 members of embeddings": (*MANY, "sigma=0.01", "train_parameters=*embed_tokens*"),
    "96 members of norms": (  # found by `estune probe --parts` and on seed 1000 of conciseness
        *MANY,
        "sigma=0.02",
        "learning_rate=0.06",
        "lr_scheduler_type=cosine",
        "train_parameters=*norm*",
    ),
    "rank one": ("noise=rank1",),
}
# The tokens of some of these, as a multiple, and by task about their steps, where a schedule has to know.
LONGER: dict[str, tuple[int, Mapping[str, int]]] = {
    "96 members and ten times the tokens": (10, {}),
    "96 members three times the tokens cosine": (3, {"capitals": 32, "conciseness": 56}),
    "96 members of norms": (1, {"capitals": 10, "conciseness": 20}),
}
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
ES = (
    "model=smollm2", "population=16", "prompts_per_step=24", "sigma=0.004", "dtype=bfloat16", "threads=1", "noise=iid",
)  # fmt: skip
TASKS = {
    "capitals": ("task.name=examples/capitals.py", "max_new_tokens=16"),
    "conciseness": ("task.name=conciseness", "max_new_tokens=64"),
    "additions": ("task.name=bench/study/additions.py", "max_new_tokens=24"),
}
EXPERIMENTS = {"capitals": 40_000, "conciseness": 80_000}  # and the tokens that a run may generate
# What a budget is for RL at the length of the base's answers: at high rates they become so short that it would last for
# hours.
RL_STEPS = {"capitals": 32, "conciseness": 20}
WATCHED = {"capitals": ("conciseness", "additions"), "conciseness": ("capitals", "additions")}
SAMPLES, POINTS = 16, 4
GREEDY = {  # what is shown, by its heading: the figure, its factor and its digits
    "greedy %": ("accuracy", 100, 1),
    "short, wrong %": ("short_but_wrong", 100, 1),
    "length": ("length", 1, 1),
    "KL": ("kl", 1, 3),
    "steps": ("steps", 1, 0),
    "tokens": ("tokens", 1, 0),
    "seconds": ("cpu_seconds", 1, 0),
    "GB": ("memory", 1e-9, 1),
}
SAMPLED = {f"pass@{k} %": (f"eval_pass@{k}", 100, 1) for k in (1, 2, 4, 8, SAMPLES)}
COMMON = ("experiment", "budget", "machine")  # of every line
BASE = "base"  # in the place of a method


def settings(experiment: str, other: str = "") -> Config:
    """Of an experiment's ES, or of `OTHERS`."""
    return load(None, [*ES, *TASKS[experiment], *OTHERS[other]])


def accuracies(checkpoint: Path, experiment: str) -> dict[str, float]:
    """Of sampled completions, pass@k with it, and of greedy ones on the tasks that are watched."""
    config = settings(experiment).model_copy(update={"eval_samples": SAMPLES, "eval_temperature": 1.0})
    engine = TransformersEngine(checkpoint, dtype=config.dtype)
    found: dict[str, float] = {}
    for name in (experiment, *WATCHED[experiment]):
        metrics = judged(
            engine, config if name == experiment else settings(name).model_copy(update={"eval_temperature": 0.0})
        )
        if name == experiment:
            found |= {key: value for key, value in metrics.items() if "@" in key}
        else:
            found[f"watch/{name}"] = metrics["eval_accuracy"]
    return found


def judged(engine: TransformersEngine, config: Config) -> dict[str, float]:
    """What an evaluation by the settings tells of the engine's weights."""
    held_out = HeldOut(config.task.build(0), config, open_encoder(config))
    metrics, _ = held_out.judge(engine.generate(held_out.asked, held_out.sampling))
    held_out.close()
    return metrics


def run(experiment: str, method: str, seeds: int, rates: Sequence[float], results: Path) -> None:
    """A method's runs that are not there yet, and the file of the experiment's results so far."""
    method, _, other = method.partition(":")
    there = [line["job"] for line in _lines(results, experiment) if line.get("settings", "") == other]
    left = [seed for seed in range(seeds) if not any(_is(job, method, seed, rates) for job in there)]
    if not left:
        return
    folder = FOLDER / " ".join([experiment, other]).strip().replace(" ", "-")
    times, steps = LONGER.get(other, (1, {}))
    budget = EXPERIMENTS[experiment] * times
    plan = Plan(
        methods=[method],
        budget=budget,
        seeds=left,
        rates=list(rates),
        batch=96,
        points=POINTS,
        es_steps=steps.get(experiment),
        rl_steps=RL_STEPS[experiment],
    )

    def told(result: dict[str, Any]) -> None:
        job = result["job"]
        print(json.dumps(result), flush=True)
        there = folder / Job(**job).name
        final = there / ("run/final" if method == "es" else "final")
        if not job["trial"] and final.is_dir():
            result |= accuracies(final, experiment)
        for weights in (final, there / "trl"):
            shutil.rmtree(weights, ignore_errors=True)  # half a gigabyte a run
        put(result | {"budget": budget} | ({"settings": other} if other else {}), experiment, results)

    compare(plan, settings(experiment, other), folder, told)


def _is(job: Mapping[str, Any], method: str, seed: int, rates: Sequence[float]) -> bool:
    """Whether a job is a method's run with the seed, at one of the rates."""
    return job["method"] == method and job["seed"] == seed and not job["trial"] and job["rate"] in (None, *rates)


def put(result: Mapping[str, Any], experiment: str, results: Path) -> None:
    """Put a run into the results, in place of an earlier one of the same job."""
    lines = _lines(results, experiment)
    if not any(line["job"]["method"] == BASE for line in lines):
        base = {"job": {"method": BASE}, **accuracies(locate(settings(experiment).model), experiment)}
        lines.insert(0, _common(experiment) | base)
    same = [line for line in lines if all(line.get(key) == result.get(key) for key in ("job", "settings"))]
    lines = [*(line for line in lines if line not in same), {**_common(experiment), **result}]
    write_text(results / f"real-{experiment}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))


def _common(experiment: str) -> dict[str, Any]:
    return dict(zip(COMMON, (experiment, EXPERIMENTS[experiment], machine()), strict=True))


def _lines(results: Path, experiment: str) -> list[dict[str, Any]]:
    return read_lines(results / f"real-{experiment}.jsonl")


def section(results: Path) -> list[str]:
    """The page's part about it: three tables a task, as far as its runs have come."""
    found = [
        "## A real model",
        "SmolLM2-135M-Instruct (`bench.study.real`), means over seeds; RL's learning rates stand in the\n"
        "names of its rows, and a trial run is left out.\n"
        "The first table of a task is of greedy completions. `short, wrong` are those of at most half of the base's\n"
        "mean length that are not right, by which a reward for brevity can be hacked; seconds are one kind of\n"
        "processor's, of training alone (runs on another have none), memory is the process's peak, the last columns\n"
        "are tasks that nobody was trained for.\n"
        f"The second is of {SAMPLES} completions at temperature 1: the share of questions that one of k is right for.\n"
        "The third is greedy accuracy at equal processor seconds, when those of each row of ES are over: learning\n"
        f"curves, of {POINTS} points, are taken to go evenly between two, and a run that is over sooner has its end's.",
    ]
    for experiment, budget in EXPERIMENTS.items():
        lines = _lines(results, experiment)
        if lines:
            rows = _rows(lines)
            watched = {f"{task} %": (f"watch/{task}", 100, 1) for task in WATCHED[experiment]}
            found += [
                f"### {experiment}, {budget:,} tokens a run",
                markdown(figures(rows, GREEDY | watched)),
                markdown(figures(rows, SAMPLED)),
                markdown(at_equal_time(rows)),
            ]
    return found


def _rows(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs that came to their end, by the name of their row: the model itself, or method and rate or settings."""
    ended = [line for line in _timed_alike(lines) if not line["job"].get("trial") and "error" not in line]
    before = next((line["base_accuracy"] for line in ended if "base_accuracy" in line), None)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for line in ended:
        if line["job"]["method"] == BASE:
            rows["before"] = [line if before is None else {"accuracy": before, **line}]
            continue
        rate = line["job"]["rate"]
        name = NAMES[line["job"]["method"]], f"{rate:g}" if rate else "", line.get("settings", "")
        rows.setdefault(", ".join(filter(None, name)), []).append(line)
    return rows


def _timed_alike(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same, without the seconds of runs on another processor than the first line's: they cannot be compared."""
    return [line if line["machine"]["cpu"] == lines[0]["machine"]["cpu"] else _untimed(line) for line in lines]


def _untimed(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a run, or of a point of its curve, without its seconds."""
    left = {key: value for key, value in figures.items() if key != "cpu_seconds"}
    return left | {"curve": [_untimed(point) for point in left["curve"]]} if "curve" in left else left


def figures(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], columns: Mapping[str, tuple[str, float, int]]
) -> list[list[str]]:
    """A row for each name, of the means of its runs' figures.

    Args:
        rows: runs by name; `before` is the model itself, and no run.
        columns: a figure, its factor and its digits by heading.
    """
    return [
        ["", "runs", *columns],
        *(
            [
                name,
                "" if name == "before" else str(len(of)),
                *(
                    spread([factor * run[key] for run in of if key in run], digits)
                    for key, factor, digits in columns.values()
                ),
            ]
            for name, of in rows.items()
        ),
    ]


def at_equal_time(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], moments: Sequence[float] | None = None
) -> list[list[str]]:
    """Greedy accuracy of each row in percent after some processor seconds, and at the end.

    Args:
        rows: runs by the name of their row; those without a curve, or whose seconds were not counted, are left out.
        moments: the seconds; by default, when those of each row of ES are over.
    """
    timed = {
        name: [run["curve"] for run in of if "cpu_seconds" in run.get("curve", [{}])[0]] for name, of in rows.items()
    }
    curves = {name: of for name, of in timed.items() if of}
    seconds = {name: statistics.fmean(curve[-1]["cpu_seconds"] for curve in of) for name, of in curves.items()}
    if moments is None:
        moments = sorted(taken for name, taken in seconds.items() if name.startswith(NAMES["es"]))
    return [
        ["", "runs", *(f"after {moment:,.0f} s" for moment in moments), "at the end", "seconds"],
        *(
            [
                name,
                str(len(of)),
                *(spread([100 * _accuracy_at(moment, curve) for curve in of], 1) for moment in moments),
                spread([100 * curve[-1]["accuracy"] for curve in of], 1),
                f"{seconds[name]:,.0f}",
            ]
            for name, of in curves.items()
        ),
    ]


def _accuracy_at(moment: float, curve: Sequence[Mapping[str, float]]) -> float:
    """Of a learning curve after so many processor seconds."""
    times, found = ([point[what] for point in curve] for what in ("cpu_seconds", "accuracy"))
    return float(np.interp(moment, times, found))


def main() -> None:
    """All of it, the first seed of every method first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="RL learning rates to try")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    for seeds in range(1, arguments.seeds + 1):
        for experiment in arguments.experiments.split(","):
            for method in arguments.methods.split(","):
                run(experiment, method, seeds, rates, arguments.results)


if __name__ == "__main__":
    main()

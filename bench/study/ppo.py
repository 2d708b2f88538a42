"""PPO on the models of the study, beside ES and the methods that TRL still has.

    python -m venv .venv-ppo
    .venv-ppo/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.45.2 'accelerate<1.1' 'datasets<4' rich
    python -m bench.study.ppo --python .venv-ppo/bin/python [--models a,b] [--seeds 0,1] [--rates 3e-5,1e-4,3e-4]

TRL 0.11.4 is its last release with a PPOTrainer that takes rewards as numbers, and has to have an older transformers,
so that PPO trains in that environment (`bench/study/ppo_train.py`) and asks here what its completions are worth. Task,
prompts, budget, the rule by which the learning rate is chosen and the evaluation are those of `bench.study.parts`; the
rest of PPO is TRL's defaults, without a KL penalty, as for the other methods. Results go to `parts-MODEL.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.common import RESULTS, machine, read_lines
from bench.study import parts
from bench.study.compare import COUNTDOWN, model_and_task

from estune.completion import Completion
from estune.config import Config, load
from estune.engines.tokenizer import load_tokenizer, open_encoder
from estune.pool.open import with_resources
from estune.run.held_out import token_ids
from estune.run.make import make_grading
from estune.study.compare.measure import greedy, measure
from estune.study.compare.plan import best_tried
from estune.tasks.base import Task
from estune.weights.locate import locate

FOLDER = Path("runs/study/ppo")
TRAIN = Path(__file__).with_name("ppo_train.py")
RATES, TRIAL_SEED, BATCH = (3e-5, 1e-4, 3e-4), 1000, 128


class Trainee:
    """A run of PPO in the other environment.

    Args:
        python: that environment's.
        given: what `ppo_train` is told first.
        log: where its libraries' words go.
    """

    def __init__(self, python: Path, given: dict[str, Any], log: Path) -> None:
        variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [python, TRAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=variables
            )
        self.tell(given)

    def tell(self, what: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(what)}\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for one."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"PPO's process ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def run(python: Path, model: str, rate: float, seed: int, trial: bool) -> dict[str, Any]:
    """One run: what it came to and, but for trials, its learning curve."""
    config = load(None, model_and_task(model))
    config = with_resources(config.model_copy(update={"replicas": 1, "threads": 1, "dtype": "float32"}))
    task = config.task.build(config.seed)
    folder = FOLDER / model / f"ppo-{rate:g}-seed{seed}{'-trial' * trial}"
    shutil.rmtree(folder, ignore_errors=True)
    base = locate(config.model)
    given = {
        "model": str(older(base, folder / "base").absolute()), "rate": rate, "seed": seed, "batch": BATCH,
        "max_new_tokens": config.max_new_tokens, "prompts": token_ids(open_encoder(config), task, task.train),
    }  # fmt: skip
    points = [(0.0, {"seconds": 0.0, "cpu_seconds": 0.0}, base)]
    points += _train(Trainee(python, given, folder / "log.txt"), config, task, folder, 1 if trial else parts.POINTS)
    for _, _, point in points[1:]:  # the same model, in the form that is read here
        shutil.copytree(base, point, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    tokens, times, last = points[-1]
    result = {
        "job": {"method": "ppo", "seed": seed, "rate": rate, "trial": trial},
        "tokens": tokens, **times, **measure(last, base, config, task, None),
    }  # fmt: skip
    if not trial:
        result["curve"] = [{"tokens": at, **took, **greedy(point, config, task)} for at, took, point in points]
    shutil.rmtree(folder)
    return result


def _train(
    trainee: Trainee, config: Config, task: Task, folder: Path, count: int
) -> list[tuple[float, dict[str, float], Path]]:
    """Answer what PPO asks until the budget is spent: tokens, seconds and checkpoint of each point of the curve."""
    tokenizer = load_tokenizer(locate(config.model))
    points: list[tuple[float, dict[str, float], Path]] = []
    tokens = 0
    with make_grading(config, task) as grading:
        while len(points) < count:
            asked = trainee.hear()
            rows = [task.train[row] for row in asked["rows"]]
            made = [
                Completion(tokenizer.decode(ids, skip_special_tokens=True), ids, True) for ids in asked["completions"]
            ]
            trainee.tell(grading.grade(rows, made).total)
            tokens += sum(map(len, asked["completions"]))
            times = trainee.hear()
            passed = tokens >= parts.BUDGET / count * (len(points) + 1)
            point = folder / f"point-{len(points)}"
            trainee.tell(
                {"save": str(point.absolute()) if passed else None, "stop": passed and len(points) + 1 == count}
            )
            if passed:
                trainee.hear()
                trainee.tell(None)
                points.append((float(tokens), times, point))
    return points


def older(base: Path, folder: Path) -> Path:
    """The model as the other environment's transformers reads it."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    return folder


def main() -> None:
    """Choose each model's rate by trials, and run its seeds at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has TRL 0.11.4")
    parser.add_argument("--models", default=",".join(COUNTDOWN))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    rates = [float(rate) for rate in arguments.rates.split(",")]
    for model in arguments.models.split(","):
        path = arguments.results / f"parts-{model}.jsonl"

        def done(rate: float, seed: int, trial: bool, model: str = model, path: Path = path) -> dict[str, Any]:
            job = {"method": "ppo", "seed": seed, "rate": rate, "trial": trial}
            lines = read_lines(path)
            found = next((line for line in lines if line["job"] == job), None)
            if found is None:
                found = run(arguments.python.absolute(), model, rate, seed, trial)
                common = {"experiment": model, "settings": "ppo", "machine": machine()}
                parts.collect(path, common, [found])
            print(model, job, found["accuracy"], found["seconds"], flush=True)
            return found

        best = best_tried("ppo", [done(rate, TRIAL_SEED, True) for rate in rates])
        assert best is not None
        for seed in arguments.seeds.split(","):
            done(best, int(seed), False)


if __name__ == "__main__":
    main()

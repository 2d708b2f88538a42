"""All jobs of a comparison, one after the other; a comparison that was cut off goes on where it was."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from estune.config import Config
from estune.errors import EstuneError
from estune.files import make_folder, read_claim, write_text
from estune.grading.level import refuse_level
from estune.study.compare.plan import Job, Plan, at_an_end, read_results
from estune.study.jobs import Jobs, claimed, told_while_running
from estune.tasks.base import Task
from estune.weights.checkpoint import Checkpoint
from estune.weights.integers import refuse_pattern
from estune.weights.locate import locate
from estune.weights.policies import POLICIES

log = logging.getLogger(__name__)

SETTINGS = "compare.json"
LOG = "log.txt"


def compare(
    plan: Plan, config: Config, folder: Path, told: Callable[[dict[str, Any]], None] | None = None
) -> list[dict[str, Any]]:
    """Run the jobs of a comparison that are not done yet.

    Args:
        plan: methods, seeds, learning rates, budget.
        config: the settings that all methods share: model, task, prompt and completion lengths; those of ES count for
            ES alone. Its task has one training set for all seeds.
        folder: where everything goes: `results.jsonl`, with a line for each run, and a folder for each run, with its
            checkpoint and journal. Runs that are recorded there are not run again.
        told: called with each result as it comes.

    Returns:
        All results, in the order in which they came; a run that ended with an error has `error` and no figures.

    Raises:
        EstuneError: for a plan that cannot be run, or a folder of another comparison.
    """
    plan.check(config)
    if any(method != "es" for method in plan.methods):
        require_trl()
    refuse_pattern(config.train_parameters, Checkpoint(locate(config.model)).tensors, POLICIES[config.weights].bits)
    from estune.pool.open import comparable_dtype, with_resources
    from estune.run.make import make_grading, make_task
    from estune.tasks.preflight import preflight

    began = _date_of(folder) if config.template_date is None else config.template_date
    ours = {"engine": "transformers", "replicas": 1, "template_date": began}
    config = config.model_copy(update=ours)
    config = with_resources(config.model_copy(update={"dtype": comparable_dtype(config)}))
    config = _with_one_training_set(config)
    task = make_task(config)
    check_task(task)
    with make_grading(config, task) as grading:
        preflight(task, grading)
    for text in plan.large_steps(config, len(task.train)):
        log.warning("%s", text)
    with _claimed(folder, plan, config):
        results = _work(plan, config, folder, plan.trials(), told)
        runs = plan.runs(results)
        missing = [m for m in plan.methods if not any(job.method == m for job in runs)]
        if missing:
            log.warning("%s: no trial came to an end, so it is left out", ", ".join(missing))
        for job in runs:
            if job.seed == plan.seeds[0] and at_an_end(job.model_dump(), results):
                log.warning("%s: rate %g is at an end of those tried: others may be better", job.method, job.rate)
        return _work(plan, config, folder, runs, told)


def require_trl() -> None:
    """Refuse to begin without TRL.

    Raises:
        EstuneError: TRL is not installed; the message says what to install.
    """
    if find_spec("trl") is None:
        raise EstuneError("compare: reinforcement learning needs TRL; install it with `pip install 'estune[trl]'`")


def _date_of(folder: Path) -> date | None:
    """The date that a comparison that has begun in this folder tells chat templates."""
    path = folder / SETTINGS
    found = read_claim(path, "config")["config"].get("template_date") if path.is_file() else None
    return None if found is None else date.fromisoformat(found)


def _with_one_training_set(config: Config) -> Config:
    """The settings with one training set: generated problems are those of the settings' own seed, in every run."""
    if getattr(config.task, "seed", 0) is not None:
        return config
    return config.model_copy(update={"task": config.task.model_copy(update={"seed": config.seed})})


def check_task(task: Task) -> None:
    """Refuse tasks that TRL's trainers would treat differently from ES."""
    if task.stages:
        raise EstuneError(f"task {task.name}: it has stages, which TRL does not know; compare on the task of one stage")
    if any(not isinstance(p := row["prompt"], str) and p[-1]["role"] == "assistant" for row in task.train):
        raise EstuneError(
            f"task {task.name}: prompts that end with the assistant's words, which ES goes on with and TRL ends; take "
            "those words out"
        )
    refuse_level(task.reward_funcs, "compare", "TRL rewards each completion by itself", "corpus", "population")
    if not task.evaluation:
        raise EstuneError(f"task {task.name}: it has no evaluation set to compare on")


def _claimed(folder: Path, plan: Plan, config: Config) -> AbstractContextManager[None]:
    """Lock the folder for this process, and keep in it what is compared; refuse to mix results of two comparisons.

    Methods, seeds and learning rates may be added, as runs do not depend on one another. A rate that was tried stays,
    or the table might not show the best of all. A setting that the folder does not know has come to estune since, and
    was at its default.
    """
    settings = config.model_dump(mode="json", exclude={"seed", "output_dir"})
    mine = {"plan": plan.model_dump(exclude={"methods", "seeds", "rates"}), "config": settings}

    def check(there: Mapping[str, Any]) -> None:
        known = {"plan": _with_defaults(there["plan"], plan), "config": _with_defaults(there["config"], config)}
        other = [key for part in mine for key in mine[part] | there[part] if mine[part].get(key) != known[part][key]]
        if other:
            raise EstuneError(
                f"{folder} holds a comparison with other {', '.join(other)}; give the same, or another --output-dir"
            )
        tried = {r["job"]["rate"] for r in read_results(folder)} - {None, *plan.rates}
        if tried:
            rates = ", ".join(f"{rate:g}" for rate in sorted(tried))
            raise EstuneError(f"{folder} holds runs at learning rates {rates}; give those as well")

    return claimed(folder, SETTINGS, "comparison", mine, ("plan", "config"), check)


def _with_defaults(there: Mapping[str, Any], now: BaseModel) -> dict[str, Any]:
    """Settings of an earlier version, those that it did not know at the defaults of what is compared now."""
    found = type(now).model_construct().model_dump(mode="json")
    for key, value in there.items():
        part = getattr(now, key, None)
        found[key] = _with_defaults(value, part) if isinstance(part, BaseModel) and isinstance(value, dict) else value
    return found


def _work(
    plan: Plan, config: Config, folder: Path, jobs: Sequence[Job], told: Callable[[dict[str, Any]], None] | None
) -> list[dict[str, Any]]:
    results = read_results(folder)
    done = [result["job"] for result in results if "error" not in result]
    left = [job for job in jobs if job.model_dump() not in done]
    ended = list[Job]()
    with told_while_running(ended, len(left)):
        for job in left:
            result = run_job(plan, job, config, folder / job.name)
            record(folder, result)
            ended.append(job)
            if told is not None:
                told(result)
    return read_results(folder)


def record(folder: Path, result: dict[str, Any]) -> None:
    """Add a result to those of the folder. It replaces an earlier failure of the same job."""
    results = [r for r in read_results(folder) if r["job"] != result["job"]]
    write_text(folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in [*results, result]))


def run_job(plan: Plan, job: Job, config: Config, folder: Path) -> dict[str, Any]:
    """Run one job in a process of its own; what it printed is in the folder's `log.txt`.

    Returns:
        What `estune.study.compare.train.run` returns, or `job` and `error` if the process failed.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a job that was cut off has left: it is run anew
    make_folder(folder)
    given = {"plan": plan.model_dump(), "job": job.model_dump(), "config": config.model_dump(mode="json")}
    write_text(folder / "job.json", json.dumps(given, indent=2))
    error = Jobs().run(
        "estune.study.compare.train",
        str(folder / "job.json"),
        log=folder / LOG,
        OMP_NUM_THREADS=str(config.threads or 1),
        TOKENIZERS_PARALLELISM="false",
    )
    if error is None:
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
    log.warning("%s failed, the others go on: %s (%s)", job.name, error, folder / LOG)
    return {"job": job.model_dump(), "error": error}

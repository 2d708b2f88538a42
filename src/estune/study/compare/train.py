"""One job in a process of its own: `python -m estune.study.compare.train JOB.json`.

It trains, measures, and writes the result. In a process of its own the peak of memory is the method's, and a crash ends
no other job.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estune.config import Config
from estune.errors import EstuneError
from estune.files import write_text
from estune.run.monitors.base import Metrics, Monitor, Request, Sample
from estune.study.compare.plan import Job, Plan
from estune.tasks.base import Task
from estune.weights.locate import locate

if TYPE_CHECKING:
    from estune.grading.convention import Row
    from estune.grading.grading import Grading


def main() -> None:
    """Run the job that the file on the command line describes."""
    path = Path(sys.argv[1])
    given = json.loads(path.read_text())
    plan = Plan(**given["plan"])
    job = Job(**given["job"])
    config = Config(**given["config"])
    try:
        result = run(plan, job, config, path.parent)
    except EstuneError as error:
        sys.exit(f"error: {error}")
    write_text(path.parent / "result.json", json.dumps(result))


def run(plan: Plan, job: Job, config: Config, folder: Path, task: Task | None = None) -> dict[str, Any]:
    """Train by the job's method until the budget is spent, and measure the result.

    Args:
        plan, job: what to do.
        config: the settings; `device`, `threads` and `replicas` are to be set.
        folder: where the checkpoint goes.
        task: a task of your own; by default the one the settings name, the same for all seeds.

    Returns:
        What `measure` returns, with tokens, steps, seconds (of training alone), cpu_seconds (of processor time, which
        other work beside leaves as they are) and memory (bytes, the process's peak until training ended, libraries
        included; on CUDA, of the device).
    """
    from estune.run.make import make_task
    from estune.study.compare.measure import greedy, measure

    task = task or make_task(config)
    progress = Progress(plan, folder)
    train = _evolve if job.method == "es" else _reinforce
    checkpoint, tokens, steps = train(plan, job, config, folder, task, progress)
    seconds, cpu_seconds = progress.taken()
    memory = _peak_memory(config.device)
    metrics = measure(checkpoint, locate(config.model), config, task, plan.short_tokens)
    figures = {"tokens": tokens, "steps": steps, "seconds": seconds, "cpu_seconds": cpu_seconds, "memory": memory}
    if not plan.points:
        return {"job": job.model_dump(), **figures, **metrics}
    # The way there, once the clock has stopped.
    curve = [{"tokens": 0.0, "seconds": 0.0, "cpu_seconds": 0.0, **greedy(locate(config.model), config, task)}]
    for at, (took, computed), point in progress.passed:
        curve.append({"tokens": at, "seconds": took, "cpu_seconds": computed, **greedy(point, config, task)})
        shutil.rmtree(point)
    if curve[-1]["tokens"] < tokens:  # it ended before the budget was spent
        curve.append({name: (figures | metrics)[name] for name in curve[0]})
    return {"job": job.model_dump(), **figures, **metrics, "curve": curve}


class Progress:
    """The points of a learning curve that a run passes, and the time that it has taken, without what they cost.

    Args:
        plan: says how many there are.
        folder: where checkpoints of them go.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._every = plan.budget / plan.points if plan.points else math.inf
        self._folder = folder
        self._start = _clocks()
        self._stood = (0.0, 0.0)
        self.passed: list[tuple[float, tuple[float, float], Path]] = []
        """Of each point the tokens, what it had `taken`, and its checkpoint."""

    def taken(self) -> tuple[float, float]:
        """Seconds of training so far, and of processor time, ended children's included."""
        wall, cpu = (now - start - stood for now, start, stood in zip(_clocks(), self._start, self._stood, strict=True))
        return wall, cpu

    def at(self, tokens: float, save: Callable[[Path], object]) -> None:
        """Tell what has been generated so far; a point that is passed is saved, while the clock stands."""
        if tokens >= self._every * (len(self.passed) + 1):
            began = _clocks()
            point = self._folder / f"point-{len(self.passed)}"
            self.passed.append((tokens, self.taken(), point))
            save(point)
            wall, cpu = (stood + now - then for stood, now, then in zip(self._stood, _clocks(), began, strict=True))
            self._stood = wall, cpu


def _clocks() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), times.user + times.system + times.children_user + times.children_system


class _Budget(Monitor):
    """Asks an ES run to end after the step that spends the budget.

    Args:
        tokens: the budget.
        progress: told what has been spent.
        save: writes a checkpoint of the weights.
    """

    def __init__(self, tokens: int, progress: Progress, save: Callable[[Path], object]) -> None:
        self.budget = tokens
        self.progress = progress
        self.save = save
        self.tokens = 0.0
        self.steps = 0

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        self.tokens = metrics["num_tokens"]
        self.steps = int(metrics["step"])
        if not metrics.get("displaced"):
            self.progress.at(self.tokens, self.save)

    def requests(self) -> Collection[Request]:
        asked: list[Request] = ["stop"] if self.tokens >= self.budget else []
        return asked


def _evolve(
    plan: Plan, job: Job, config: Config, folder: Path, task: Task, progress: Progress
) -> tuple[Path, float, int]:
    from estune.run.trainer import Trainer

    prompts = min(config.rows_of_member, len(task.train))
    most = math.ceil(plan.budget / (config.members * prompts))  # every completion has a token at least
    steps = plan.es_steps or most
    steps += -steps % config.steps_in_one
    changes: dict[str, Any] = {"seed": job.seed, "output_dir": folder / "run", "steps": steps}
    if plan.es_steps is None:  # schedules have to know the run's length
        changes |= {"lr_scheduler_type": "constant", "sigma_scheduler_type": "constant"}
    changes |= {"eval_steps": 0, "save_steps": 0, "log_completions": 0, "report_to": []}
    changes |= {"watch": [], "compare_with_base": False}
    changes["save_dtype"] = "float32"  # what is evaluated in the end are the weights that generated
    budget = _Budget(plan.budget, progress, lambda path: trainer.pool.save(path, "float32"))
    # Nothing is evaluated on the way: nor does TRL, and seconds are of training.
    blind = replace(task, evaluation=[], accuracy=None)
    trainer = Trainer(config.model_copy(update=changes), task=blind, monitors=[budget])
    trainer.train()
    return trainer.run.final, budget.tokens, budget.steps


def _reinforce(
    plan: Plan, job: Job, config: Config, folder: Path, task: Task, progress: Progress
) -> tuple[Path, float, int]:
    import torch
    from datasets import Dataset
    from transformers.trainer_callback import TrainerCallback

    from estune.engines.tokenizer import load_tokenizer
    from estune.render import stop_clock
    from estune.run.make import make_grading

    torch.set_num_threads(config.threads or 1)
    if config.template_date is not None:
        stop_clock(config.template_date)  # TRL renders in this process
    path = locate(config.model)
    arguments, trainer_class = trl_arguments(plan, job, config, folder)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    tokenizer.padding_side = "left"
    # Rows travel by number: a column of a data set must be of one type, and a task's may be of any.
    template = tokenizer.chat_template is not None
    rows = [{"prompt": task.shown(row, template=template), "row": i} for i, row in enumerate(task.train)]
    with make_grading(config, task) as grading:
        reward = TaskReward(task, grading)

        class Spent(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = reward.tokens >= plan.budget or state.global_step == plan.rl_steps
                progress.at(reward.tokens, lambda path: trainer.save_model(str(path)))

        trainer = trainer_class(
            model=str(path),
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Spent()],
        )
        freeze_others(trainer.model, path, config.train_parameters)
        trainer.train()
    trainer.save_model(str(folder / "final"))
    return folder / "final", reward.tokens, trainer.state.global_step


def freeze_others(model: Any, checkpoint: Path, pattern: str) -> None:
    """Leave what ES leaves as it is to gradients, too.

    Experts that a model merges into one tensor are trained all, where the pattern names any of them.

    Args:
        model: a transformers model.
        checkpoint: that it was loaded from.
        pattern: `train_parameters`.

    Raises:
        EstuneError: the pattern leaves no parameter.
    """
    from estune.weights.checkpoint import Checkpoint
    from estune.weights.parameters import trained_parameters

    chosen = trained_parameters(model, Checkpoint(checkpoint).tensors, pattern)
    trained = {parameter.tensor.untyped_storage().data_ptr() for parameter in chosen}
    for own in model.parameters():
        own.requires_grad_(own.untyped_storage().data_ptr() in trained)


def trl_arguments(plan: Plan, job: Job, config: Config, folder: Path) -> tuple[Any, Callable[..., Any]]:
    """TRL's arguments and trainer class for a job: its defaults, except for what the plan says.

    The learning rate is constant, because a schedule would have to know the number of steps, and the budget is in
    tokens. Weights are float32, as ES's base is, and are computed with in the type that ES generates in.
    """
    import torch

    import trl
    from estune.engines.loading import pick_dtype

    dtype = pick_dtype(config.dtype, torch.device(config.device))
    names = {field.name for field in fields(trl.GRPOConfig)}
    # It has both names for a while; the older is the only one of older versions of transformers.
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "seed": job.seed,
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "max_steps": 1 << 30,
        "per_device_train_batch_size": plan.backward,
        "gradient_accumulation_steps": plan.batch // plan.backward,
        "num_generations": plan.generations,
        "max_completion_length": config.max_new_tokens,
        "chat_template_kwargs": config.chat_template_kwargs,
        "temperature": plan.rl_temperature,
        "beta": plan.beta,
        checkpointing: False,  # slower, and small models have the memory
        "model_init_kwargs": {"dtype": "float32"},
        "trust_remote_code": config.trust_remote_code,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": config.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job.method == "rloo":
        return trl.RLOOConfig(**common), trl.RLOOTrainer
    scale = "none" if job.method == "dr_grpo" else "group"
    return trl.GRPOConfig(**common, loss_type=job.method, scale_rewards=scale), trl.GRPOTrainer


class TaskReward:
    """A task's rewards, weighted and added up, as one reward function for TRL. It counts the tokens that it sees."""

    __name__ = "task_reward"

    def __init__(self, task: Task, grading: Grading) -> None:
        self.task = task
        self.grading = grading
        self.tokens = 0

    def __call__(
        self, *, completions: list[Any], completion_ids: list[list[int]], row: list[int], **_: Any
    ) -> list[float | None]:
        """The total reward of each completion; None if no reward applies."""
        from estune.completion import Completion

        self.tokens += sum(map(len, completion_ids))
        rows: list[Row] = [self.task.train[i] for i in row]
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        made = [Completion(text, ids, True) for text, ids in zip(texts, completion_ids, strict=True)]
        return self.grading.grade(rows, made).total


def _peak_memory(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would start with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()

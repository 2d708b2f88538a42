"""What the commands do that is not training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from estune.checkpoint import EMBEDDED, Checkpoint, locate
from estune.config import Config, load, merge, parse, read
from estune.errors import EstuneError
from estune.journal import FILE, Journal
from estune.replay import base_checkpoint
from estune.run import RESUME_FROM_PYTHON, RunDirectory, default_path, find_checkpoint, refuse_used, resumed, task_of
from estune.tasks.base import Task

if TYPE_CHECKING:
    from estune.estimate import Estimate
    from estune.needs import Work
    from estune.shapes import Shape

PROMPT_TOKENS, TINY_PROMPT_TOKENS = 120, 9  # of a Countdown prompt: about, and to the embedded model's tokenizer


def evaluate_model(
    model: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    output: Path | None = None,
    *,
    task: Task | None = None,
) -> dict[str, float]:
    """Metrics of a run's best checkpoint, or of a model, on the held-out set and those of the tasks that are watched.

    They are those that training tells of an evaluation, under the same names.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's.
        output: where to write the completions, as parquet; its column `task` tells whose they are.
        task: a task of your own; by default the one the settings name.

    Raises:
        EstuneError: where the settings do not give the task and the data that the run was trained on, or a task has no
            held-out set.
    """
    from estune.evaluation import write_completions
    from estune.held_out import HeldOut
    from estune.setup import open_encoder, open_local_pool, with_resources

    given = read(file, overrides or [])
    config = _settings_for(model, given)
    task = task or _task_for(model, config, given)
    config = config.model_copy(update={"model": str(find_checkpoint(model)), "workers": None})
    config = with_resources(config, perturbs=False)
    encoder, metrics, records = open_encoder(config), dict[str, float](), list[dict[str, Any]]()
    with ExitStack() as opened:
        held_out = []
        for each in (task, *(options.build(config.seed) for options in config.watch)):
            if not each.evaluation:
                raise EstuneError(f"task {each.name} has no evaluation set: give it one, or another task")
            held_out.append(HeldOut(each, config, encoder))
            opened.callback(held_out[-1].close)
        pool = open_local_pool(config, perturbs=False)
        opened.callback(pool.close)
        for which in held_out:
            found, graded = which.evaluate(pool)
            name = which.task.name
            watched = {f"watch/{name}/{key.removeprefix('eval_')}": value for key, value in found.items()}
            metrics |= found if which is held_out[0] else watched
            records += graded.records(task=name)
    if output is not None:
        write_completions(output, records)
    return metrics


def describe(config: Config) -> str:
    """What `estune train` would do with these settings: checks settings, model and data, writes nothing.

    Raises:
        EstuneError: for what `estune train` would refuse, as far as it can be known without reading the weights.
    """
    from estune.monitors import check_trackers

    output = config.output_dir or default_path(config, config.task.name)
    refuse_used(output)
    check_trackers(config)
    checkpoint = Checkpoint(locate(config.model))
    elements = sum(t.elements for t in checkpoint.tensors.values())
    task = config.task.build(config.seed)
    _check_weights(config, checkpoint)
    _check_prompts(config, task)
    prompts = min(config.prompts_per_step, len(task.train))
    completions = config.steps * config.population * prompts
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return (
        f"{text}\n"
        f"model {config.model}: {elements:,} parameters in {checkpoint.path}\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows\n"
        f"{config.steps} steps x {config.population} members x {prompts} prompts = {completions:,} completions of at "
        f"most {config.max_new_tokens} tokens\n"
        f"output goes to {output}; nothing has been written"
    )


def describe_rest(run: Path, changed: Mapping[str, Any]) -> str:
    """What `estune train --resume` would do: checks journal, base model and data, writes nothing.

    Args:
        run: the run's directory.
        changed: settings of `RESUMABLE`, as `Trainer.resume` takes them.

    Raises:
        EstuneError: where journal, base model or data are not what the run began with.
    """
    journal = Journal.read(run)
    done = len(journal.steps)
    config = resumed(journal, changed)
    base = base_checkpoint(journal.header, config.model)
    task = task_of(run, journal.header, config, RESUME_FROM_PYTHON)
    start = next((step for step in RunDirectory(run).checkpoints() if step <= done), 0)
    return (
        f"run {run}: {done} of {config.steps} steps done, {max(0, config.steps - done)} to go\n"
        f"model {base.path}: as the run began\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows, as the run began\n"
        f"begins with {f'checkpoint-{start}' if start else 'the base model'} and replays {done - start} steps\n"
        f"output goes to {run}; nothing has been written"
    )


def estimate_run(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    gpu: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: float | None = None,
) -> Estimate:
    """What `estune train` with these settings needs, from the model's config.json alone.

    Args:
        file, overrides: settings.
        gpu: a GPU of the table; if None, this machine's, or its CPU where it has none.
        prompt_tokens: mean length of a prompt; that of a Countdown prompt if None.
        new_tokens: mean length of a completion; `max_new_tokens` if None.

    Raises:
        EstuneError: for bad settings, an unknown GPU, or a model whose configuration cannot be had or understood.
    """
    from estune.devices import as_device, find_gpu, measure_cpu, this_gpu
    from estune.engines import decode, graph, transformers
    from estune.estimate import make_estimate
    from estune.needs import BYTES, Work, base_bytes, fitting_rows
    from estune.shapes import read_shape
    from estune.storage import keeps_base_on_host
    from estune.tasks.countdown import GENERATED_SIZE

    config = load(file, overrides)
    usual = TINY_PROMPT_TOKENS if config.model in EMBEDDED else PROMPT_TOKENS
    work = Work(
        population=config.population,
        prompts=config.prompts_per_step,
        prompt_tokens=usual if prompt_tokens is None else prompt_tokens,
        new_tokens=config.max_new_tokens if new_tokens is None else new_tokens,
        max_new_tokens=config.max_new_tokens,
        rows=1,
        slots=1,
        at_once=min(config.workers, config.workers_per_gpu) if config.workers else config.replicas or 1,
        dtype="float32" if config.dtype == "auto" else config.dtype,
        policy=config.weights,
        workers=config.workers,
    )
    _check_counts(work)
    shape = read_shape(config.model, config.train_parameters)
    found = (find_gpu(gpu), None) if gpu is not None else this_gpu(config.device)
    if found is None:
        replicas, threads = _replicas(config, shape)
        work = replace(work, at_once=config.workers or replicas, slots=work.longest)
        device = measure_cpu(shape, config.batch_size or work.prompts, work.dtype, threads)
        most, prefill_tokens = transformers.MAX_ROWS["cpu"], decode.PREFILL_TOKENS["cpu"]
    else:
        dtype = (shape.dtype or work.dtype) if config.dtype == "auto" else work.dtype
        slots, parallel = graph.round_up(work.longest, graph.LEAST_SLOTS), config.gpus_per_worker
        work = replace(work, dtype=dtype, slots=slots, parallel=parallel)
        sheet, size = found
        device = as_device(sheet, dtype, size)
        most, prefill_tokens = transformers.MAX_ROWS_ELSEWHERE, decode.PREFILL_TOKENS_ELSEWHERE
        base, live = base_bytes(shape, work.policy, dtype), shape.parameters * BYTES[dtype]
        if base and keeps_base_on_host(
            config.base_device, base=base // parallel, live=live // parallel, memory=device.memory // work.at_once
        ):
            work = replace(work, base="host")
    each = device.memory // work.at_once if device.is_gpu else device.memory
    most = config.batch_size or fitting_rows(shape, work, each, share=transformers.MEMORY_SHARE, most=most)
    # The engine makes batches of equal size. Those of an evaluation can be larger than a step's.
    sizes = (work.prompts, config.task.eval_size or GENERATED_SIZE)
    rows = max(math.ceil(size / math.ceil(size / most)) for size in sizes)
    return make_estimate(config.model, shape, replace(work, rows=rows), device, prefill_tokens)


def _check_counts(work: Work) -> None:
    for option, count in (("--prompt-tokens", work.prompt_tokens), ("--new-tokens", work.new_tokens)):
        if not 1 <= count < math.inf:
            raise EstuneError(f"{option} must be 1 or more, found {count:g}")
    if work.new_tokens > work.max_new_tokens:
        raise EstuneError(
            f"--new-tokens {work.new_tokens:g} is more than max_new_tokens {work.max_new_tokens}: raise it"
        )


def _replicas(config: Config, shape: Shape) -> tuple[int, int]:
    """Replicas and threads of each on this machine's CPU."""
    from estune.needs import BYTES
    from estune.setup import share_cores

    return share_cores(config, shape.parameters * BYTES[shape.dtype or "float32"])


def _settings_for(model: str, given: Mapping[str, Any]) -> Config:
    if not (Path(model) / FILE).is_file():
        return parse({**given, "model": model})
    settings = Journal.read(Path(model)).settings
    return parse(merge({**settings, "device": _device_of(settings)}, given), model)


def _device_of(settings: Mapping[str, Any]) -> str:
    """The device of a run, or auto where this machine has none like it."""
    from estune.place import chosen_device

    try:
        chosen_device(settings["device"])
    except EstuneError:
        return "auto"
    return str(settings["device"])


def _task_for(model: str, config: Config, given: Mapping[str, Any]) -> Task:
    run = Path(model)
    if not (run / FILE).is_file():
        return config.task.build(config.seed)
    remedy = f"evaluate it from Python, with estune.commands.evaluate_model({model!r}, task=...)"
    other_data = not given.keys().isdisjoint(("task", "seed"))
    return task_of(run, Journal.read(run).header, config, remedy, other_data=other_data)


def _check_weights(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse a device that is not there or has no kernels, and a pattern that no tensor's name fits."""
    from estune.place import training_device

    training_device(config.device)
    if not any(fnmatchcase(name, config.train_parameters) for name in checkpoint.tensors):
        raise EstuneError(
            f"train_parameters: no tensor's name fits {config.train_parameters!r}; names look like "
            f"{next(iter(checkpoint.tensors))}"
        )


def _check_prompts(config: Config, task: Task) -> None:
    """Refuse prompts that the tokenizer does not take, or that leave no room for a completion."""
    from estune.setup import make_sampling, open_encoder

    encoder = open_encoder(config)
    for rows in (task.evaluation, task.train):
        encoder.check(encoder.encode([row["prompt"] for row in rows]), make_sampling(config))

"""What `estune train` would do, without doing it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from estune.charts.words import amount
from estune.completion import Completion
from estune.config import Config
from estune.grading.convention import Batch, Row
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal
from estune.journal.replay import refuse_changed_model
from estune.run.directory import RunDirectory, default_path, refuse_used
from estune.run.make import make_order, make_task
from estune.run.metric_names import refuse_unknown_constraint
from estune.run.recorded import RESUME_FROM_PYTHON, task_of
from estune.run.remarks import before
from estune.run.resume import resumed
from estune.tasks.base import Task
from estune.weights.adapted import open_checkpoint
from estune.weights.integers import refuse_pattern
from estune.weights.parameters import fits
from estune.weights.policies import POLICIES
from estune.weights.quantized import refuse_quantized
from estune.weights.scales import refuse_unused

if TYPE_CHECKING:
    from estune.engines.prompts import PromptEncoder

MADE_UP = "The answer is 42."
MOST_LINES = 40  # shown of a prompt


class Outline(NamedTuple):
    """What a run would do, in words, and what its data tell of the time that it takes.

    Attributes:
        text: what it would do.
        prompt_tokens: of a training prompt, the mean.
        held_out: rows of its task that are evaluated on.
        in_turns: its rollouts may take several turns.
    """

    text: str
    prompt_tokens: int
    held_out: int
    in_turns: bool


def describe(config: Config) -> Outline:
    """What `estune train` would do with these settings: checks settings, model and data, writes nothing.

    Raises:
        EstuneError: for what `estune train` would refuse, as far as it can be known without reading the weights.
    """
    from estune.run.monitors import check_trackers

    output = config.output_dir or default_path(config, config.task.name)
    refuse_used(output)
    check_trackers(config)
    checkpoint = open_checkpoint(config.model, config.adapter)
    refuse_quantized(checkpoint, POLICIES[config.weights].bits)
    elements = sum(t.elements for t in checkpoint.tensors.values())
    engine = _check_engine(config)
    task = make_task(config)
    refuse_unknown_constraint(config, task)
    refuse_pattern(config.train_parameters, checkpoint.tensors, POLICIES[config.weights].bits)
    refuse_unused(config.sigma_scale, [name for name in checkpoint.tensors if fits(name, config.train_parameters)])
    example, prompt_tokens = _try_prompts(config, task)
    order = make_order(config, task)
    notes = "".join(f"note: {remark}\n" for remark in before(config, task, order))
    prompts = order.per_step // config.prompt_groups * config.samples_per_prompt
    completions = config.steps * config.members * prompts
    settings: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    text = (
        f"{settings}\n"
        f"model {config.model}: {elements:,} parameters in {checkpoint.path}\n"
        f"engine {engine}\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows\n"
        f"{amount(config.steps, 'steps')} x {amount(config.members, 'members')} x {amount(prompts, 'prompts')} = "
        f"{amount(completions, 'completions')} of at most {config.max_new_tokens} tokens\n"
        f"{example}\n{notes}"
        f"output goes to {output}; nothing has been written"
    )
    return Outline(text, prompt_tokens, len(task.evaluation), task.rollout is not None)


def describe_rest(
    run: Path, changed: Mapping[str, Any], *, accept_changes: bool = False, trust_task: bool = False
) -> str:
    """What `estune train --resume` would do: checks journal, base model and data, writes nothing.

    Args:
        run: the run's directory.
        changed, accept_changes, trust_task: as `Trainer.resume` takes them.

    Raises:
        EstuneError: where journal, base model or data are not what the run began with.
    """
    journal = Journal.read(run)
    done = len(journal.steps)
    config = resumed(journal, changed)
    base = base_checkpoint(journal.header, config.model)
    refuse_changed_model(journal, base.path, accept=accept_changes)
    insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
    task, _ = task_of(journal, config, changed, RESUME_FROM_PYTHON, **insists)
    start = next((step for step in RunDirectory(run).checkpoints() if step <= done), 0)
    return (
        f"run {run}: {done} of {amount(config.steps, 'steps')} done, {max(0, config.steps - done)} to go\n"
        f"model {base.path}: as the run began\n"
        f"task {task.name}: {len(task.train):,} training and {len(task.evaluation):,} held-out rows, as the run began\n"
        f"begins with {f'checkpoint-{start}' if start else 'the base model'} and replays "
        f"{amount(done - start, 'steps')}\n"
        f"output goes to {run}; nothing has been written"
        f"{_time_of_rest(config, journal, in_turns=task.rollout is not None)}"
    )


def _time_of_rest(config: Config, journal: Journal, *, in_turns: bool) -> str:
    """A line of what the steps to come take, if each takes what the last ones did; nothing where there are none."""
    from estune.run.monitors.pace import RECENT, outlook, too_long

    left = config.steps - len(journal.steps)
    times = [record.metrics["step_time"] for record in journal.steps[-RECENT:] if "step_time" in record.metrics]
    if left <= 0 or not times:
        return ""
    step = statistics.fmean(times)
    tokens = config.members * config.rows_of_member * config.max_new_tokens
    how = "as the last steps took, evaluations not counted" + (", tokens of one turn a rollout" if in_turns else "")
    said = outlook(tokens, step, left * step, most=False, how=how)
    warning = too_long(left * step)
    return f"\n{said}" + (f"\nwarning: {warning}" if warning else "")


def _check_engine(config: Config) -> str:
    """Refuse a device that is not there or has no kernels, and vLLM where it is not installed.

    Returns:
        What generates, as far as it can be known before the model is loaded.
    """
    from estune.engines.vllm.internals import check_version
    from estune.pool.open import with_engine
    from estune.weights.device import training_device

    device = training_device(config.device)
    if config.engine == "vllm" and not config.ray_address and not config.workers_at:
        check_version()
    if config.ray_address and (config.engine, config.device) == ("auto", "auto"):
        return "vllm, if the cluster has GPUs and vLLM can train the model there, else transformers"
    found = with_engine(config, str(device)).engine
    return "vllm or, where that cannot train the model, transformers" if found == "auto" else found


def _try_prompts(config: Config, task: Task) -> tuple[str, int]:
    """Refuse prompts that the tokenizer does not take or that leave no room for a completion, and rewards that fail.

    Returns:
        One prompt as the model is shown it, with what rewards receive and give for a completion of it; and the mean
        length of a training prompt, in tokens.
    """
    from estune.engines.tokenizer import open_encoder
    from estune.run.held_out import encode_rows
    from estune.run.make import make_sampling

    encoder = open_encoder(config)
    sampling = make_sampling(config)
    encode_rows(encoder, task, dict(enumerate(task.evaluation)), "evaluation row", sampling)
    ids = encode_rows(encoder, task, dict(enumerate(task.train)), "training row", sampling)
    row = task.train[0]
    text = encoder.render(task.shown(row, template=encoder.has_template))
    shown = f"\nthe first training prompt, {len(ids[0])} tokens, as the model is shown it:\n{_indented(text)}\n\n"
    return shown + _graded(config, task, row, encoder), round(statistics.fmean(map(len, ids)))


def _graded(config: Config, task: Task, row: Row, encoder: PromptEncoder) -> str:
    """What rewards receive for a completion of a row, and what they give for it."""
    from estune.run.make import make_grading
    from estune.tasks.preflight import preflight

    gold = None if task.gold is None else task.gold(row)
    text = MADE_UP if gold is None else gold
    completion = Completion(text, encoder.tokenizer(text, add_special_tokens=False)["input_ids"], finished=True)
    with make_grading(config.model_copy(update={"graders": 1}), task) as grading:
        preflight(task, grading)
        columns = Batch([row], [completion], grading.state).columns
        grades = grading.grade([row], [completion])
    received = "\n".join(f"  {name} = {_short(values)}" for name, values in columns.items())
    given = "\n".join(f"  {name}: {'does not apply' if s is None else s}" for name, (s,) in grades.scores.items())
    kind = "a made-up completion" if gold is None else "its gold answer"
    return f"for {kind} rewards receive\n{received}\nand give\n{given}\n  in all: {grades.total[0]}\n"


def _indented(text: str) -> str:
    lines = text.split("\n")
    shown = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 4], "[...]", *lines[-3:]]
    return "\n".join(f"  {line if len(line) <= 500 else f'{line[:400]} [...] {line[-80:]}'}" for line in shown)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"

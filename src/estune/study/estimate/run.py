"""An estimate of what a run needs, from its settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from estune.config import Config, load
from estune.errors import EstuneError
from estune.weights.checkpoint import EMBEDDED
from estune.weights.policies import BYTES, POLICIES

if TYPE_CHECKING:
    from estune.study.estimate.estimate import Estimate
    from estune.study.estimate.needs import Work
    from estune.study.estimate.shapes import Shape

PROMPT_TOKENS, TINY_PROMPT_TOKENS = 120, 9  # of a Countdown prompt: about, and to the embedded model's tokenizer


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
    from estune.engines import decode, graph, transformers
    from estune.study.estimate.estimate import make_estimate
    from estune.study.estimate.machines import as_device, find_gpu, measure_cpu, this_gpu
    from estune.study.estimate.needs import Work, fitting_rows
    from estune.study.estimate.shapes import read_shape
    from estune.tasks.countdown import GENERATED_SIZE
    from estune.weights.base import keeps_base_on_host

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
        base = POLICIES[work.policy].base_bytes(shape.trained, dtype)
        live = shape.parameters * BYTES[dtype]
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
    from estune.pool.open import share_cores

    return share_cores(config, shape.parameters * BYTES[shape.dtype or "float32"])

"""An estimate of what a run needs, from its settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from estune.config import Config, load
from estune.errors import EstuneError
from estune.weights.locate import EMBEDDED
from estune.weights.policies import BYTES, POLICIES

if TYPE_CHECKING:
    from estune.study.estimate.estimate import Estimate
    from estune.study.estimate.machines import GPU, Device
    from estune.study.estimate.needs import Work
    from estune.study.estimate.shapes import Shape

PROMPT_TOKENS = 120  # of a Countdown prompt, about
TINY_PROMPT_TOKENS = 9  # of the same to the embedded model's tokenizer
SPLITS = (1 / 4, 1 / 2, 2.0, 4.0)  # of the members, for as many completions
MOST_COMPLETIONS = 1 << 22  # of a step, or an evaluation, that is played through in memory


def estimate_run(
    file: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    gpu: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: float | None = None,
    lengths: Path | None = None,
    held_out: int | None = None,
) -> Estimate:
    """What `estune train` needs with these settings, from the model's config.json alone.

    Args:
        file, overrides: settings.
        gpu: a GPU of the table; if None, this machine's, or its CPU where it has none.
        prompt_tokens: mean length of a prompt; that of a Countdown prompt if None.
        new_tokens: mean length of a completion, around which lengths are spread; if None, all are of `max_new_tokens`.
        lengths: a file of completions' lengths instead (`lengths.py`).
        held_out: rows of an evaluation; if None, as many as the settings say or, where they do not, as Countdown has.

    Raises:
        EstuneError: for bad settings, an unknown GPU, a file without lengths, or a model whose configuration cannot be
            had or understood.
    """
    from estune.study.estimate.estimate import make_estimate
    from estune.study.estimate.lengths import read_lengths, spread_lengths
    from estune.study.estimate.machines import find_gpu, this_gpu
    from estune.study.estimate.shapes import read_shape

    overrides = list(overrides)
    config = load(file, overrides)
    if lengths is not None and new_tokens is not None:
        raise EstuneError("--lengths and --new-tokens both say how long completions are: give one")
    found = None if lengths is None else read_lengths(lengths).clip(max=config.max_new_tokens)
    work = _work(config, prompt_tokens, new_tokens if found is None else float(found.mean()), held_out)
    _check_counts(work)
    drawn = spread_lengths(work.new_tokens, work.max_new_tokens) if found is None else found
    bits = POLICIES[config.weights].bits
    shape = read_shape(config.model, config.train_parameters, config.adapter, bits=bits)
    if not shape.splits_over(config.gpus_per_worker):
        raise EstuneError(
            f"gpus_per_worker {config.gpus_per_worker}: vLLM gives every GPU as many of a layer's {shape.heads} heads "
            f"of queries and {shape.heads // shape.grouped} of keys and values; take a number that divides both"
        )
    chosen = (find_gpu(gpu), None) if gpu is not None else this_gpu(config.device)
    placed = _on_this_cpu(config, work, shape) if chosen is None else _on_gpus(config, work, shape, *chosen)
    work = _decoded(config, placed, shape)
    engines = _by_engine(config, placed, shape)
    if not placed.device.is_gpu and not work.rank:
        engines += _by_rank_one(file, [*overrides, "noise=rank1"], placed, shape)
    if work.engine == "vllm" and placed.device.is_gpu:
        work = _held_by_vllm(config, work, placed.device, shape)
    splits = _splits(config, placed, shape)
    return make_estimate(config.model, shape, work, placed.device, placed.prefill_tokens, drawn, engines, splits)


@dataclass(frozen=True, slots=True)
class _Placed:
    """What a step does, now that it is known where."""

    work: Work  # but for its rows, and the members that are decoded together
    device: Device
    prefill_tokens: int  # in one forward of prompts

    @property
    def memory(self) -> int:
        """Bytes that an engine reckons with."""
        return self.device.memory // self.work.at_once if self.device.is_gpu else self.device.memory


def _work(config: Config, prompt_tokens: int | None, new_tokens: float | None, held_out: int | None) -> Work:
    """What a step does, as far as the settings tell."""
    from estune.study.estimate.needs import Work
    from estune.tasks.countdown import GENERATED_SIZE

    usual = TINY_PROMPT_TOKENS if config.model in EMBEDDED else PROMPT_TOKENS
    rows = (config.task.eval_size or GENERATED_SIZE) if held_out is None else held_out
    return Work(
        population=config.members,
        prompts=config.rows_of_member,
        prompt_tokens=usual if prompt_tokens is None else prompt_tokens,
        new_tokens=config.max_new_tokens if new_tokens is None else new_tokens,
        max_new_tokens=config.max_new_tokens,
        rows=1,
        slots=1,
        at_once=min(config.workers, config.sharing) if config.workers else config.replicas or 1,
        dtype="float32" if config.dtype == "auto" else config.dtype,
        policy=config.weights,
        group_size=config.weights_group_size,
        carry_steps=config.carry_steps,
        keeps_error=config.carry == "keep",
        workers=config.workers or len(config.workers_at) or None,
        engine="vllm" if config.engine == "vllm" else "transformers",  # of auto; on a GPU both are shown
        steps=config.steps,
        evaluations=_evaluations(config),
        moments=config.adam,
        drawn=1 + (config.guided_window * config.population if config.guided_share else 0),
        again=_again(config),
        rank=config.noise_rank,
        evaluated=rows * config.eval_samples,
        looks=config.prompt_groups if config.guard is not None else 0,
    )


def _again(config: Config) -> int:
    """Members of earlier steps whose noise an update draws again."""
    from estune.es.earlier import Momentum

    if config.sam_rho:
        return config.population // 2  # every second update
    steps = config.guided_window if config.guided_share else Momentum(config.momentum, config.momentum_window).steps
    return steps * config.population


def _evaluations(config: Config) -> int:
    every = config.eval_steps or max(1, config.steps)
    return config.eval_on_start + math.ceil(config.steps / every)


def _decoded(config: Config, placed: _Placed, shape: Shape) -> Work:
    """The work with the members that are decoded together, and the rows of the largest batch.

    The engine makes batches of equal size, and an evaluation's can exceed a step's.
    """
    work = _together(config, placed.work, shape, placed.memory, on_cpu=not placed.device.is_gpu)
    most = _most_rows(config, work, shape, placed.memory, on_cpu=not placed.device.is_gpu)
    sizes = (work.prompts * work.together, work.evaluated // config.eval_samples)
    return replace(work, rows=max(math.ceil(size / math.ceil(size / most)) for size in sizes if size))


def _together(config: Config, work: Work, shape: Shape, memory: int, *, on_cpu: bool) -> Work:
    """The work with as many members in a batch as the engine decodes together.

    What is not seen here: a task of rollouts, which are played one member at a time; weights that a model's own forward
    turns out to use in ways of its own; and models or layers that vLLM's LoRA does not know.

    Args:
        config, work, shape: the run.
        memory: bytes that an engine reckons with.
        on_cpu: where it decodes.
    """
    from estune.engines.transformers import MEMORY_SHARE
    from estune.engines.vllm.engine import slots_for

    drifts = POLICIES[work.policy].drifts
    if work.engine == "vllm":
        slots = slots_for(config, on_cpu=on_cpu)
        if config.adapter is not None:
            return replace(work, way="slots", together=slots)
        served = shape.slotted and slots > 1 and not config.workers_at and (on_cpu or work.dtype != "float32")
        return replace(work, way="low-rank slots", together=slots) if work.rank and served and not drifts else work
    if not work.rank or not shape.joins or work.workers is not None or drifts or work.grid is not None:
        return work
    most = _most_rows(config, work, shape, memory, on_cpu=on_cpu) // work.prompts
    if on_cpu and shape.own:
        share = math.ceil(work.population / work.engines)
        return replace(work, way="fused", together=max(1, min(most, share)))
    bytes_ = BYTES[work.dtype]
    room = (memory - shape.parameters * bytes_) // MEMORY_SHARE
    most = min(most, room // (shape.vectors(work.rank) * bytes_), work.population)
    return replace(work, way="forward", together=max(1, most))


def _most_rows(config: Config, work: Work, shape: Shape, memory: int, *, on_cpu: bool) -> int:
    """Rows that the engine takes at once, at most. The arguments are those of `_together`."""
    from estune.engines.transformers import MAX_ROWS, MAX_ROWS_ELSEWHERE, MEMORY_SHARE
    from estune.study.estimate.needs import fitting_rows

    most = MAX_ROWS["cpu"] if on_cpu else MAX_ROWS_ELSEWHERE
    return config.batch_size or fitting_rows(shape, work, memory, share=MEMORY_SHARE, most=most)


def _by_engine(config: Config, placed: _Placed, shape: Shape) -> list[Work]:
    """The work as the run's engine does it and, on a GPU, as the other engine would, if it can.

    On a CPU rates are measured, but not those of vLLM.
    """
    device = placed.device
    if not device.is_gpu:
        return [_decoded(config, placed, shape)]

    def by(engine: Literal["transformers", "vllm"]) -> Work:
        work = replace(placed.work, engine=engine, captured=config.cuda_graphs)
        decoded = _decoded(config, replace(placed, work=work), shape)
        return replace(decoded, rows=_vllm_rows(config, decoded, device, shape)) if engine == "vllm" else decoded

    if placed.work.engine != "vllm":
        return [by("transformers"), by("vllm")]
    return [by("vllm")] if placed.work.parallel > 1 or config.workers_at else [by("vllm"), by("transformers")]


def _splits(config: Config, placed: _Placed, shape: Shape) -> list[Work]:
    """The work of the run's engine with its completions shared out over fewer members, or more."""
    work = placed.work
    found = []
    for times in SPLITS:
        population, prompts = work.population * times, work.prompts / times
        if population >= 2 and population.is_integer() and prompts.is_integer():
            split = replace(work, population=int(population), prompts=int(prompts))
            counts = {"population": int(population), "prompts_per_step": int(prompts), "samples_per_prompt": 1}
            found.append(_by_engine(config.model_copy(update=counts), replace(placed, work=split), shape)[0])
    return found


def _by_rank_one(file: Path | None, overrides: list[str], placed: _Placed, shape: Shape) -> list[Work]:
    """The work with noise of rank one, where that lets members be decoded together on this CPU."""
    try:
        config = load(file, overrides)
    except EstuneError:  # something that is set takes another noise
        return []
    work = _decoded(config, replace(placed, work=replace(placed.work, rank=1)), shape)
    return [work] if work.together > 1 else []


def _vllm_rows(config: Config, work: Work, device: Device, shape: Shape) -> int:
    """Mean number of sequences that vLLM decodes at once: those it is started for, if keys and values fit."""
    from estune.study.estimate.needs import of_members

    held = _held_by_vllm(config, work, device, shape)
    bytes_ = BYTES[work.dtype]
    room = held.share * device.memory / work.at_once - (shape.parameters * bytes_ + _base(work, shape)) / work.parallel
    room -= of_members(shape, work).amount
    each = shape.cached * bytes_ / work.parallel * (work.prompt_tokens + work.new_tokens)
    return max(1, min(held.rows, int(room / each))) if each else held.rows


def _held_by_vllm(config: Config, work: Work, device: Device, shape: Shape) -> Work:
    """The work with the number and length of sequences, and the share of GPU memory, that vLLM is started with."""
    from estune.engines.vllm.engine import GPU_SHARE, rows_at_once
    from estune.pool.open import with_length

    share = GPU_SHARE
    if config.vllm_gpu_memory_utilization is not None:  # of an engine, without its base
        base = _base(work, shape) / work.parallel
        share = min(1.0, work.at_once * (config.vllm_gpu_memory_utilization + base / device.memory))
    return replace(
        work,
        rows=rows_at_once(config, on_cpu=False, members=work.together),
        slots=with_length(config, work.prompt_tokens).vllm_max_model_length or work.slots,
        share=share,
    )


def _base(work: Work, shape: Shape) -> int:
    """Bytes of an engine's base on its devices."""
    return POLICIES[work.policy].base_bytes(shape.trained, work.dtype) if work.base == "device" else 0


def _on_this_cpu(config: Config, work: Work, shape: Shape) -> _Placed:
    import torch

    from estune.engines import decode
    from estune.engines.memory import total_memory
    from estune.pool.open import share_cores, with_resources
    from estune.study.estimate.machines import measure_cpu
    from estune.weights.locate import is_here

    replicas, threads = share_cores(config, shape.parameters * BYTES[shape.dtype or "float32"])
    dtype = work.dtype
    if is_here(config.model):  # as the run will find it
        found = with_resources(config.model_copy(update={"device": "cpu"}))
        replicas = found.replicas or replicas
        threads = found.threads or threads
        dtype = dtype if found.dtype == "auto" else found.dtype
        work = replace(work, rank=found.noise_rank)
    here = 1 if config.workers_at else config.workers or replicas  # a server is counted as a machine like this one
    work = replace(work, dtype=dtype, at_once=here, slots=work.longest)
    together = _together(config, work, shape, total_memory(torch.device("cpu")), on_cpu=True).together
    device = measure_cpu(shape, config.batch_size or work.prompts * together, work.dtype, threads)
    return _Placed(work, device, decode.PREFILL_TOKENS["cpu"])


def _on_gpus(config: Config, work: Work, shape: Shape, sheet: GPU, size: int | None) -> _Placed:
    """The work on GPUs of a line of the table, with `size` bytes if that is known."""
    from estune.engines import decode, graph, transformers
    from estune.engines.memory import LOGITS_BYTES, fitting_engines
    from estune.study.estimate.machines import as_device
    from estune.weights.base import keeps_base_on_host

    dtype = (shape.dtype or work.dtype) if config.dtype == "auto" else work.dtype
    parallel = config.gpus_per_worker
    device = as_device(sheet, dtype, size)
    base = POLICIES[work.policy].base_bytes(shape.trained, dtype)
    live = shape.parameters * BYTES[dtype]
    policy = POLICIES[work.policy]

    def keeps_on_host(memory: int) -> bool:
        sizes = {"base": base // parallel, "live": live // parallel, "memory": memory}
        return policy.keeps_base and keeps_base_on_host(config.base_device, **sizes)

    slots = graph.round_up(work.longest, graph.LEAST_SLOTS)
    alone = parallel > 1 or policy.drifts or (config.engine == "vllm" and not config.workers)
    if config.workers_per_gpu == "auto" and not alone:
        count = fitting_engines(
            device.memory,
            live=live,
            base=0 if keeps_on_host(device.memory) else base,
            rows=min(work.prompts, config.batch_size or transformers.MAX_ROWS_ELSEWHERE),
            row=shape.cached * work.longest * BYTES[dtype] + LOGITS_BYTES * shape.vocabulary,
            share=transformers.MEMORY_SHARE,
        )
        work = replace(work, at_once=min(config.workers or count, count))
    on_host = base > 0 and keeps_on_host(device.memory // work.at_once)
    work = replace(work, dtype=dtype, slots=slots, parallel=parallel, base="host" if on_host else "device")
    return _Placed(work, device, decode.PREFILL_TOKENS_ELSEWHERE)


def _check_counts(work: Work) -> None:
    for option, count in (("--prompt-tokens", work.prompt_tokens), ("--new-tokens", work.new_tokens)):
        if not 1 <= count < math.inf:
            raise EstuneError(f"{option} must be 1 or more, found {count:g}")
    if work.new_tokens > work.max_new_tokens:
        raise EstuneError(
            f"--new-tokens {work.new_tokens:g} is more than max_new_tokens {work.max_new_tokens}: raise it"
        )
    for what, count in (("a step", work.population * work.prompts), ("an evaluation", work.evaluated)):
        if count > MOST_COMPLETIONS:
            raise EstuneError(
                f"{what} of these settings has {count:,} completions, and an estimate plays through at most "
                f"{MOST_COMPLETIONS:,}: take fewer, as time and cost are in proportion"
            )

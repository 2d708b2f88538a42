"""From settings to a pool: on which device, by which engine, and how many of them."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Callable
from datetime import date
from typing import Any, TypeVar

import torch

from estune import children
from estune.config import Config
from estune.engines.cpu.fused import has_own_products
from estune.engines.loading import load_config
from estune.engines.memory import LOGITS_BYTES, cached_elements, fitting_engines, total_memory
from estune.engines.transformers import MAX_ROWS, MAX_ROWS_ELSEWHERE, MEMORY_SHARE
from estune.errors import EstuneError
from estune.pool.base import Generating, Pool
from estune.pool.fastest import fastest, ways
from estune.pool.generators import Generators, open_generators
from estune.pool.launch import await_ahead, end_ahead
from estune.pool.local import open_local_pool
from estune.pool.waiting import told_while, told_while_loading
from estune.weights.base import keeps_base_on_host
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import chosen_device, training_device
from estune.weights.locate import locate, pinned
from estune.weights.policies import BYTES, POLICIES, NoiseMode
from estune.weights.quantized import quantized_by

T = TypeVar("T")
log = logging.getLogger(__name__)

LENGTH_STEP = 256  # tokens to which `vllm_max_model_length` is rounded up: what vLLM compiles, it keeps by the length
_INSTEAD = "engine=auto takes transformers: %s"
# Models above this size share their matrices' rows over all cores; smaller ones do better with one member per core.
LARGEST_REPLICATED = 256 << 20
LEAST_TRIED = 1 << 24
"""Elements from which on a trial tells what a CPU is fastest with. Smaller models stay in its caches: one a core."""
FULL_BATCH = 64  # completions of a member up to which, about, a decoding step costs what it does with one
PROMPT_ROOM = 512  # tokens of a prompt, in deciding how many engines a GPU holds, before any is read


def with_resources(config: Config, live_dtype: str | None = None, *, alone: bool = False) -> Config:
    """The settings to train with: `device`, `replicas`, `threads`, `workers_per_gpu` and `noise` as this machine has
    them, a hub id's commit and the date of today.

    They are part of a run: another device, or matrix products shared out over other threads, can change the last bits
    of its results, and another date what a chat template says.

    Args:
        config: the settings.
        live_dtype: for a run that goes on, the type of its weights, as `dtype` may be open in its settings.
        alone: members are evaluated one by one, whatever their noise, as in rollouts of several turns.

    Raises:
        EstuneError: for a device that is not there or cannot be trained on, or a model that cannot be had.
    """
    if alone or config.workers_at:
        config = config.model_copy(update={"noise": config.noise_mode})
    if config.workers_at:  # how they compute was said where they were started
        dated = config.template_date or date.today()
        return config.model_copy(update={"model": pinned(config.model), "template_date": dated})
    if config.workers and config.device == "auto":
        from estune.pool.ray.cluster import cluster_device

        return _with_device(config, cluster_device(config), live_dtype)
    return _with_device(config, str(training_device(config.device)), live_dtype)


def comparable_dtype(config: Config) -> str:
    """The `dtype` for runs that are to be compared: on a CPU one for all, whatever a trial would find for each."""
    tried = config.dtype == "auto" and config.engine != "vllm" and not config.workers
    return "float32" if tried and training_device(config.device).type == "cpu" else config.dtype


def with_resources_to_generate(config: Config) -> Config:
    """As `with_resources`, to generate only, which more devices can do.

    Raises:
        EstuneError: for a device that is not there, or a model that cannot be had.
    """
    return _with_device(config, str(chosen_device(config.device)))


def _with_device(config: Config, device: str, live_dtype: str | None = None) -> Config:
    config = config.model_copy(update={"noise": _noise(config, device)})
    sharing = config.sharing
    found: dict[str, Any] = {"model": pinned(config.model), "device": device}
    if device.startswith("cpu"):
        found |= _share_processor(config, live_dtype)
    else:
        if config.workers_per_gpu == "auto":
            sharing = share_gpu(config, device)
        found["replicas"] = config.replicas or (1 if config.workers else sharing)
        found["threads"] = config.threads or (1 if device.startswith("cuda") else available_cores())
    found["workers_per_gpu"] = sharing if config.workers else 1
    found["template_date"] = config.template_date or date.today()
    return with_engine(config.model_copy(update=found), device)


def _noise(config: Config, device: str) -> NoiseMode:
    """What `noise=auto` is: on a CPU rank one, where a member's completions leave room in a batch for others'.

    That pays for weights that are read from memory, and is known of models that our own kernels decode, around a base
    that is kept; these kernels have one norm for the queries of all members.
    """
    if (
        config.noise != "auto"
        or not device.startswith("cpu")
        or config.rows_of_member >= FULL_BATCH
        or config.workers
        or config.engine == "vllm"
        or config.adapter is not None
        or config.guided_share
        or not POLICIES[config.weights].keeps_base
    ):
        return config.noise_mode
    checkpoint = Checkpoint(locate(config.model))
    tensors = checkpoint.tensors.values()
    small = sum(tensor.elements for tensor in tensors) < LEAST_TRIED
    if small or any(tensor.name.endswith("q_norm.weight") for tensor in tensors):
        return "iid"
    model = load_config(checkpoint.path, trust_remote_code=config.trust_remote_code)
    widths = [tensor.columns for tensor in tensors if len(tensor.shape) == 2]
    return "rank1" if has_own_products(model, widths, config.dtype) else "iid"


def share_cores(config: Config, size: int) -> tuple[int, int]:
    """Replicas, and threads of each, for weights of `size` bytes on this CPU: a member a core, or all cores for one."""
    cores = available_cores()
    threads = config.threads or (1 if size <= LARGEST_REPLICATED else cores)
    if POLICIES[config.weights].drifts:
        return 1, threads  # what restoring leaves behind depends on who came before
    if config.workers or config.engine == "vllm":
        return 1, threads
    return config.replicas or max(1, min(cores // threads, config.population)), threads


def _share_processor(config: Config, live_dtype: str | None) -> dict[str, Any]:
    """`replicas`, `threads` and, unless vLLM chooses it, `dtype` on this CPU: the fastest, by a short trial.

    Small models need no trial. If `replicas` is given, threads are as `share_cores` says.
    """
    checkpoint = Checkpoint(locate(config.model))
    tensors = checkpoint.stored.values()
    size = sum(t.size for t in tensors)
    replicas, threads = share_cores(config, size)
    found: dict[str, Any] = {"replicas": replicas, "threads": threads}
    elements = sum(t.elements for t in tensors)
    in_halves = 2 * sum(t.elements for t in tensors if t.dtype == "BF16") > elements
    if config.dtype == "auto" and in_halves and POLICIES[config.weights].splits_base:
        config = config.model_copy(update={"dtype": "bfloat16"})
        found["dtype"] = "bfloat16"
    if config.engine == "vllm" or elements < LEAST_TRIED or quantized_by(checkpoint.path) is not None:
        return found
    model = load_config(checkpoint.path, trust_remote_code=config.trust_remote_code)
    dtypes = ["float32", "bfloat16"] if in_halves else ["float32"]
    if config.dtype != "auto":
        dtypes = [config.dtype]
    elif live_dtype is not None:
        dtypes = [live_dtype]
    alone = bool(config.workers) or POLICIES[config.weights].drifts
    room = total_memory(torch.device("cpu")) // 2 - POLICIES[config.weights].base_bytes(elements, "float32")
    choices = ways(
        dtypes,
        available_cores(),
        most=max(1, min(config.population, room // (elements * BYTES[dtypes[0]]))),
        replicas=1 if alone else config.replicas,
        threads=threads if config.workers or config.replicas else config.threads,
    )
    if len(choices) > 1:
        shapes = [(t.shape[0], t.shape[1]) for t in tensors if len(t.shape) == 2]
        own = has_own_products(model, [width for _, width in shapes], dtypes[0])
        together = config.noise_rank > 0 and not alone
        members = math.ceil(config.population / available_cores()) if together else 1
        rows = min(config.rows_of_member * members, config.batch_size or MAX_ROWS["cpu"])
        await_ahead()
        chosen = fastest(shapes, rows, choices, own=own, together=together)
        log.info("%s is fastest here: dtype, replicas and threads of this run", chosen)
    else:
        (chosen,) = choices
    return {"dtype": chosen.dtype, "replicas": chosen.replicas, "threads": chosen.threads}


def share_gpu(config: Config, device: str) -> int:
    """What `workers_per_gpu=auto` stands for on GPUs like this machine's, with the model that the settings name.

    Raises:
        EstuneError: this machine has no GPU whose memory could be divided.
    """
    chosen = torch.device(device)
    # An engine over several GPUs, or weights that drift, are alone; vLLM is but one without workers.
    alone = config.gpus_per_worker > 1 or POLICIES[config.weights].drifts
    if chosen.type != "cuda" or alone or (config.engine == "vllm" and not config.workers):
        return 1
    if not torch.cuda.is_available():
        raise EstuneError(
            "workers_per_gpu auto goes by the memory of this machine's GPU, and it has none: give a number"
        )
    checkpoint = Checkpoint(locate(config.model))
    model = load_config(checkpoint.path, trust_remote_code=config.trust_remote_code)
    elements = sum(t.elements for t in checkpoint.tensors.values())
    stored = sum(t.size for t in checkpoint.tensors.values())
    dtype = config.dtype if config.dtype != "auto" else "float32" if stored > 2 * elements else "bfloat16"
    memory = total_memory(chosen)
    live = elements * BYTES[dtype]
    policy = POLICIES[config.weights]
    base = policy.base_bytes(elements, dtype)
    on_host = policy.keeps_base and keeps_base_on_host(config.base_device, base=base, live=live, memory=memory)
    slots = config.max_new_tokens + PROMPT_ROOM
    return fitting_engines(
        memory,
        live=live,
        base=0 if on_host else base,
        rows=min(config.rows_of_member, config.batch_size or MAX_ROWS_ELSEWHERE),
        row=cached_elements(model) * slots * BYTES[dtype]
        + LOGITS_BYTES * model.get_text_config(decoder=True).vocab_size,
        share=MEMORY_SHARE,
    )


def with_engine(config: Config, device: str) -> Config:
    """The settings with `engine=auto` made "transformers" where vLLM is not to be tried.

    vLLM is tried if weights are on CUDA, one replica is enough, and a version of vLLM that we know is installed, as far
    as can be seen from here. Whether it takes the model only a trial tells, which `open_pool` makes.

    Args:
        config: the settings.
        device: where the model runs, as `torch.device` takes it.
    """
    if config.engine != "auto":
        return config
    tried = device.startswith("cuda") and (config.replicas or 1) == 1
    if tried and not config.ray_address:
        from estune.engines.vllm.internals import check_version

        try:
            check_version()
        except EstuneError as error:
            log.warning(_INSTEAD, str(error))
            tried = False
    return config if tried else config.model_copy(update={"engine": "transformers"})


def with_length(config: Config, longest: int | None) -> Config:
    """The settings with `vllm_max_model_length`, if it is not given, set for prompts of at most `longest` tokens.

    A model can have a hundred times the positions that a run needs, and vLLM sets itself up for as many as it may use.
    """
    if config.engine == "transformers" or config.vllm_max_model_length is not None or longest is None:
        return config
    needed = longest + config.max_new_tokens + 1  # to score a text vLLM needs room for a token more
    return config.model_copy(update={"vllm_max_model_length": math.ceil(needed / LENGTH_STEP) * LENGTH_STEP})


def open_pool(config: Config, longest: int | None = None) -> Pool:
    """Servers or workers on a Ray cluster if the settings have any, else this machine's replicas.

    Which engine `auto` has come to, `Pool.describe` says.

    Args:
        config: the settings.
        longest: tokens of the longest prompt that is to come; None for any that the model can take.

    Raises:
        EstuneError: for a model that cannot be had or trained, or a cluster that cannot be reached.
    """

    def open_as(config: Config) -> Pool:
        if config.workers_at:
            from estune.pool.remote.pool import open_remote_pool

            return open_remote_pool(config)
        if config.workers:
            from estune.pool.ray.pool import open_ray_pool

            return open_ray_pool(config)
        return open_local_pool(config)

    return _open(config, longest, open_as)


def open_to_generate(config: Config, longest: int | None = None) -> Generators[Generating]:
    """As many generators as `config.replicas` says: the one of this process, and those in processes of their own.

    Args:
        config, longest: as for `open_pool`.

    Raises:
        EstuneError: for a model or a device that cannot be had.
    """
    return _open(config, longest, open_generators)


def _open(config: Config, longest: int | None, open_as: Callable[[Config], T]) -> T:
    """Load the model with the engine that the settings name; with auto, by vLLM or, where that fails, transformers."""
    if config.engine == "auto":
        try:
            return _open(config.model_copy(update={"engine": "vllm"}), longest, open_as)
        except EstuneError as error:
            log.warning(_INSTEAD, str(error))
        gc.collect()  # what vLLM has loaded hung on the error
        torch.cuda.empty_cache()
        config = config.model_copy(update={"engine": "transformers"})
    where = f" on {config.workers} Ray workers" if config.workers else ""
    if config.workers_at:
        where = f" at {', '.join(config.workers_at)}"
    here = config.engine == "transformers" and not where
    try:
        with (told_while_loading if here else told_while)(f"loading {config.model} with {config.engine}{where}"):
            return open_as(with_length(config, longest))
    finally:
        end_ahead()


def available_cores() -> int:
    """How many cores this process may use: OMP_NUM_THREADS if it is set, else all that the system gives it."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return children.cores()

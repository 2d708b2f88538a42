"""From settings to what a run needs: pool, prompt encoder, strategy, sampling."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from estune.checkpoint import Checkpoint, locate
from estune.config import Config
from estune.engines.base import Sampling
from estune.place import chosen_device, training_device
from estune.pool import LocalPool, Pool
from estune.replica import Replica
from estune.rewards.grade import TrainerState
from estune.rewards.grading import Grading
from estune.shared import Share, open_memory
from estune.strategy import EvolutionStrategy
from estune.tasks.base import Task
from estune.worker import WorkerProcess

if TYPE_CHECKING:
    from estune.engines.prompts import PromptEncoder

# Models above this size share their matrices' rows over all cores; smaller ones do better with one member per core.
LARGEST_REPLICATED = 256 << 20


def with_resources(config: Config, *, perturbs: bool = True) -> Config:
    """The settings with `device`, `replicas` and `threads` as this machine has them.

    They are part of a run: another device, or a matrix product shared out over other threads, can change its last bits.

    Args:
        config: the settings.
        perturbs: False where weights are only generated with, which more devices can.

    Raises:
        EstuneError: for a device that is not there, or a model that cannot be had.
    """
    device = _device(config, perturbs=perturbs)
    if device.startswith("cpu"):
        size = sum(t.size for t in Checkpoint(locate(config.model)).tensors.values())
        replicas, threads = share_cores(config, size)
    else:
        replicas, threads = config.replicas or 1, config.threads or 1
    return config.model_copy(update={"device": device, "replicas": replicas, "threads": threads})


def _device(config: Config, *, perturbs: bool) -> str:
    if config.workers and config.device == "auto":
        from estune.ray_pool import cluster_device

        return cluster_device(config)
    return str((training_device if perturbs else chosen_device)(config.device))


def share_cores(config: Config, size: int) -> tuple[int, int]:
    """Replicas, and threads of each, for weights of `size` bytes on this CPU: a member a core, or all cores for one."""
    cores = available_cores()
    threads = config.threads or (1 if size <= LARGEST_REPLICATED else cores)
    if config.weights == "inplace":
        return 1, threads  # what restoring leaves behind depends on who came before
    if config.workers or config.engine == "vllm":
        return 1, threads
    return config.replicas or max(1, min(cores // threads, config.population)), threads


def open_encoder(config: Config) -> PromptEncoder:
    """What makes token ids of prompts, wherever the engines are; loads no weights.

    Raises:
        EstuneError: for a model whose configuration or tokenizer cannot be had.
    """
    from estune.engines.loading import load_config, load_tokenizer
    from estune.engines.prompts import PromptEncoder

    path = locate(config.model)
    most = config.vllm_max_model_length if config.engine == "vllm" else None
    return PromptEncoder(config.model, load_tokenizer(path), load_config(path), most)


def open_pool(config: Config) -> Pool:
    """Workers on a Ray cluster if the settings have any, else this machine's replicas.

    Raises:
        EstuneError: for a model that cannot be had or trained, or a cluster that cannot be reached.
    """
    if config.workers:
        from estune.ray_pool import open_ray_pool

        return open_ray_pool(config)
    return open_local_pool(config)


def open_local_pool(config: Config, *, perturbs: bool = True) -> LocalPool:
    """The replica of this process, and those in processes of their own.

    On a CPU they share one base, which the replica of this process fills. Those that do not perturb have none.

    Raises:
        EstuneError: for a model that cannot be had or, if they perturb, trained.
    """
    count = config.replicas or 1
    has_base = perturbs and config.weights != "inplace"
    one_base = has_base and count > 1 and training_device(config.device).type == "cpu"
    memory = open_memory() if one_base else None
    shares = [None if memory is None else Share(memory, i, count) for i in range(count)]
    workers: list[WorkerProcess] = []
    try:
        workers.extend(WorkerProcess(share) for share in shares[1:])
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            opened = [threads.submit(worker.open, config, perturbs) for worker in workers]
            own = Replica(config, shares[0], perturbs=perturbs)
            for future in opened:
                future.result()
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    finally:
        if memory is not None:
            os.close(memory)  # all have mapped it, or never will
    return LocalPool(own, workers, one_base=one_base)


def available_cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where it is set, else all it is given."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_strategy(config: Config, origin: str | None = None) -> EvolutionStrategy:
    """The settings' strategy.

    Args:
        config: the settings.
        origin: for a run that goes on from another, the fingerprint it starts with: its perturbations are to be others.
    """
    return EvolutionStrategy(
        seed=config.seed if origin is None else config.seed ^ int(origin, 16) >> 1,
        population=config.population,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        steps=config.steps,
        schedule=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        mirrored=config.mirrored,
    )


def make_grading(config: Config, task: Task, state: TrainerState | None = None) -> Grading:
    """What applies a task's rewards, as the settings say."""
    return Grading(
        task.reward_funcs,
        task.reward_weights,
        processes=config.graders,
        deadline=config.reward_timeout,
        errors=config.reward_errors,
        max_errors=config.max_reward_errors,
        state=state,
    )


def make_sampling(config: Config, seed: int = 0) -> Sampling:
    """The settings' way of drawing completions."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)

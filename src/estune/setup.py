"""From settings to what a run needs: replicas, strategy, sampling."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from estune.checkpoint import Checkpoint, locate
from estune.config import Config
from estune.engines.base import Sampling
from estune.pool import LocalPool
from estune.replica import Replica, training_device
from estune.shared import Share, open_memory
from estune.strategy import EvolutionStrategy
from estune.worker import WorkerProcess

# Models above this size share their matrices' rows over all cores; smaller ones do better with one member per core.
LARGEST_REPLICATED = 256 << 20


def with_resources(config: Config) -> Config:
    """The settings with `replicas` and `threads` filled in: one member a core, or all cores for one; one on a GPU.

    Threads are part of a run: how a matrix product is shared out can change its last bits.
    """
    if training_device(config.device).type != "cpu":
        return config.model_copy(update={"replicas": config.replicas or 1, "threads": config.threads or 1})
    size = sum(t.size for t in Checkpoint(locate(config.model)).tensors.values())
    cores = available_cores()
    small = size <= LARGEST_REPLICATED
    threads = config.threads or (1 if small else cores)
    replicas = config.replicas or max(1, min(cores // threads, config.population))
    if config.weights == "inplace":
        replicas = 1  # what restoring leaves behind depends on who came before
    return config.model_copy(update={"replicas": replicas, "threads": threads})


def open_pool(config: Config) -> tuple[Replica, LocalPool]:
    """The replica of this process, and a pool of it and of those in processes of their own.

    On a CPU they share one base, which the replica of this process fills.

    Raises:
        EstuneError: for a model that cannot be had or trained.
    """
    count = config.replicas or 1
    one_base = count > 1 and config.weights != "inplace" and training_device(config.device).type == "cpu"
    memory = open_memory() if one_base else None
    shares = [None if memory is None else Share(memory, i, count) for i in range(count)]
    workers: list[WorkerProcess] = []
    try:
        workers.extend(WorkerProcess(share) for share in shares[1:])
        with ThreadPoolExecutor(max(1, len(workers))) as threads:
            opened = [threads.submit(worker.open, config) for worker in workers]
            own = Replica(config, shares[0])
            for future in opened:
                future.result()
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    finally:
        if memory is not None:
            os.close(memory)  # all have mapped it, or never will
    return own, LocalPool([own, *workers], one_base=one_base)


def available_cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where it is set, else all it is given."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_strategy(config: Config) -> EvolutionStrategy:
    """The settings' strategy."""
    return EvolutionStrategy(
        seed=config.seed,
        population=config.population,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        steps=config.steps,
        schedule=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        mirrored=config.mirrored,
    )


def make_sampling(config: Config, seed: int = 0) -> Sampling:
    """The settings' way of drawing completions."""
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)

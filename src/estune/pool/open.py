"""From settings to what a run needs: pool, prompt encoder, strategy, sampling."""

from __future__ import annotations

import os
from datetime import date
from typing import Any

from estune.config import Config
from estune.pool.base import Pool
from estune.pool.local import open_local_pool
from estune.pool.waiting import told_while
from estune.weights.checkpoint import Checkpoint, locate, pinned
from estune.weights.device import chosen_device, training_device
from estune.weights.policies import POLICIES

# Models above this size share their matrices' rows over all cores; smaller ones do better with one member per core.
LARGEST_REPLICATED = 256 << 20


def with_resources(config: Config) -> Config:
    """The settings to train with: `device`, `replicas` and `threads` as this machine has them, a hub id's commit and
    the date of today.

    They are part of a run: another device, or a matrix product shared out over other threads, can change its last bits,
    and another date what a chat template says.

    Raises:
        EstuneError: for a device that is not there or cannot be trained on, or a model that cannot be had.
    """
    if config.workers and config.device == "auto":
        from estune.pool.ray.cluster import cluster_device

        return _with_device(config, cluster_device(config))
    return _with_device(config, str(training_device(config.device)))


def with_resources_to_generate(config: Config) -> Config:
    """As `with_resources`, where weights are only generated with, which more devices can.

    Raises:
        EstuneError: for a device that is not there, or a model that cannot be had.
    """
    return _with_device(config, str(chosen_device(config.device)))


def _with_device(config: Config, device: str) -> Config:
    if device.startswith("cpu"):
        size = sum(t.size for t in Checkpoint(locate(config.model)).tensors.values())
        replicas, threads = share_cores(config, size)
    else:
        replicas = config.replicas or 1
        threads = config.threads or (1 if device.startswith("cuda") else available_cores())
    found: dict[str, Any] = {"model": pinned(config.model), "device": device, "replicas": replicas, "threads": threads}
    found["template_date"] = config.template_date or date.today()
    return config.model_copy(update=found)


def share_cores(config: Config, size: int) -> tuple[int, int]:
    """Replicas, and threads of each, for weights of `size` bytes on this CPU: a member a core, or all cores for one."""
    cores = available_cores()
    threads = config.threads or (1 if size <= LARGEST_REPLICATED else cores)
    if POLICIES[config.weights].drifts:
        return 1, threads  # what restoring leaves behind depends on who came before
    if config.workers or config.engine == "vllm":
        return 1, threads
    return config.replicas or max(1, min(cores // threads, config.population)), threads


def open_pool(config: Config) -> Pool:
    """Workers on a Ray cluster if the settings have any, else this machine's replicas.

    Raises:
        EstuneError: for a model that cannot be had or trained, or a cluster that cannot be reached.
    """
    where = f" on {config.workers} Ray workers" if config.workers else ""
    with told_while(f"loading {config.model} with {config.engine}{where}"):
        if config.workers:
            from estune.pool.ray.pool import open_ray_pool

            return open_ray_pool(config)
        return open_local_pool(config)


def available_cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where it is set, else all it is given."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The pool whose workers are Ray actors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from estune.config import Config
from estune.errors import EstuneError
from estune.pool.crewed import CrewPool
from estune.pool.deadlines import Deadlines
from estune.pool.ray.cluster import connect, disconnect, lost, needs
from estune.pool.ray.handle import RayHandle
from estune.pool.slots import Slot
from estune.weights.adapters import PREFIX
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import EMBEDDED, locate

BY_VALUE = 90_000  # bytes of prompts: Ray sends 100 KiB along with a call, and more through its object store


def open_ray_pool(config: Config) -> RayPool:
    """As many workers as `config.workers` says, of which at least one is ready.

    Raises:
        EstuneError: for a cluster that cannot be reached or has no room, or a model that no worker can have.
    """
    connect(config)
    return RayPool(config).opened()


class RayPool(CrewPool):
    """Workers on the cluster that this process is connected to."""

    def __init__(self, config: Config) -> None:
        config = _for_workers(config)
        super().__init__(config, config.workers or 1, Cluster(config))

    def close(self) -> None:
        """End all workers, and a cluster that was started for them."""
        super().close()
        disconnect()

    def _sent(self, prompt_ids: Sequence[Sequence[int]]) -> Any:
        if len(pickle.dumps(prompt_ids)) <= BY_VALUE:
            return prompt_ids  # Ray ends, with no word, a process that puts an object when its raylet has just died
        return ray.put(prompt_ids)  # sent to a node once a step, not once a member

    def members_at_once(self) -> int:
        """As `CrewPool.members_at_once`."""
        return self._slots

    @cached_property
    def _slots(self) -> int:
        return slots_of_worker(self._config, adapted=next(iter(self.describe().tensors)).startswith(PREFIX))

    def _is_near(self, slot: Slot) -> bool:
        here = ray.get_runtime_context().get_node_id()
        return slot.handle is not None and slot.handle.place is not None and slot.handle.place.node == here


def slots_of_worker(config: Config, *, adapted: bool) -> int:
    """How many members a worker takes at once. One whose vLLM turned out to have no slots takes as many one by one.

    Args:
        config: the settings that workers are given.
        adapted: whether an adapter is trained.
    """
    if config.engine != "vllm":
        return 1
    from estune.engines.vllm.engine import slots_for
    from estune.engines.vllm.low_rank import slotted_tensors

    on_cpu = config.device == "cpu"
    in_slots = adapted or slotted_tensors(Checkpoint(locate(config.model)), config, on_cpu=on_cpu)
    return slots_for(config, on_cpu=on_cpu) if in_slots else 1


class Cluster:
    """As `Source`: the cluster that this process is connected to.

    Args:
        config: the settings that workers are given.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def hire(self, number: int, deadlines: Deadlines) -> RayHandle:
        """As `Source.hire`."""
        return RayHandle(number, self._config, deadlines)

    def check(self, *, at_once: bool = False) -> None:
        """As `Source.check`: without its cluster Ray would end this process soon."""
        gone = lost(at_once=at_once)
        if gone is not None:
            raise EstuneError(f"{gone}; no step is lost: resume, with another cluster or none")

    def missing(self, seconds: float, lost: str) -> str:
        """As `Source.missing`."""
        need = needs(self._config)
        there = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {key: there.get(key, 0) for key in need}
        last = f"; the last one was lost: {lost}" if lost else ""
        return (
            f"for {seconds:.0f} s there was room for no worker: each takes {_listed(need)} of a node, and of the "
            f"cluster {_listed(free)} are free{last}; add nodes, ask for less or "
            "wait longer (worker_timeout), and start or resume"
        )


def _for_workers(config: Config) -> Config:
    """The settings for workers, which run in other directories and see their own GPUs alone."""
    model = config.model
    device = config.device.partition(":")[0]
    if model not in EMBEDDED and Path(model).exists():
        model = str(Path(model).absolute())
    return config.model_copy(update={"model": model, "device": device})


def _listed(resources: dict[str, float]) -> str:
    return " and ".join(f"{value:g} {key}" for key, value in resources.items())

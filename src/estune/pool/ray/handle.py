"""A worker as the pool sees it: an actor whose calls have deadlines, and that can be ended for certain."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from estune.config import Config
from estune.errors import first_line
from estune.pool.base import Description
from estune.pool.deadlines import Deadlines, Lost
from estune.pool.ray.cluster import needs
from estune.pool.ray.worker import RayWorker
from estune.pool.worker import Place


class RayHandle:
    """As `Handle`: a process with a `RayWorker`, which starts when the cluster has room for it.

    Args:
        number: of the worker, from 0, for messages.
        config: the run's settings.
        deadlines: shared by the workers of a run.
    """

    def __init__(self, number: int, config: Config, deadlines: Deadlines) -> None:
        self.number = number
        self.place: Place | None = None
        self.done: int | None = None
        self._config = config
        self._deadlines = deadlines
        resources = needs(config)
        options: dict[str, Any] = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
        self._group = None
        if config.gpus_per_worker > 1:  # GPUs of one engine must be on one machine
            self._group = placement_group([resources], strategy="STRICT_PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        actor_class: Any = ray.remote(RayWorker)
        self.actor = actor_class.options(max_restarts=0, max_task_retries=0, **options).remote()
        self._where = self.actor.where.remote()

    def __str__(self) -> str:
        where = f" on {self.place.host} (process {self.place.pid})" if self.place else ""
        return f"worker {self.number}{where}"

    def look(self, seconds: float) -> Place | None:
        """As `Handle.look`."""
        if self.place is None and ray.wait([self._where], timeout=seconds)[0]:
            self.place = self._result(self._where, seconds)
        return self.place

    def open(self) -> tuple[Description, int | None]:
        """As `Handle.open`."""
        return self.call("open", self._config), 0

    def call(self, kind: str, *arguments: Any, units: int = 1) -> Any:
        """As `Handle.call`."""
        limit = self._deadlines.of(kind, units)
        began = time.monotonic()
        method: Callable[..., Any] = getattr(self.actor, kind).remote
        try:
            result = self._result(method(*arguments), limit)
        except GetTimeoutError:
            raise Lost(f"no answer for {limit:.0f} s (worker_timeout)") from None
        self._deadlines.took(kind, time.monotonic() - began)
        return result

    def end(self) -> None:
        """End the worker's process, even if it is stopped, and free its resources of the cluster."""
        with suppress(Exception):  # the cluster itself may be gone
            ray.kill(self.actor)  # Ray asks first, and kills after some seconds
        with suppress(Exception):
            if self._group is not None:
                remove_placement_group(self._group)

    @staticmethod
    def _result(reference: Any, limit: float) -> Any:
        try:
            return ray.get(reference, timeout=limit)
        except RayTaskError as error:
            raise error.cause from None
        except GetTimeoutError:
            raise
        except RayError as error:
            raise Lost(_how(error)) from None


def _how(error: RayError) -> str:
    """The part of Ray's paragraph on a lost worker that can be acted on."""
    text = " ".join(str(error).split())
    for sign, meaning in (
        ("out of memory", "Ray ended it, as its machine was short of memory: use fewer workers or a smaller base"),
        ("ModuleNotFoundError", text[text.find("ModuleNotFoundError") :][:120]),
        ("connection error code 2", "its process ended at once (killed, out of memory or crashed)"),
        ("node", "its process ended (" + text.rpartition("The actor is dead because ")[2][:160] + ")"),
    ):
        if sign.lower() in text.lower():
            return meaning
    return first_line(error)

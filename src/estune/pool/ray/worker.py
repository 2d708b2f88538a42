"""A worker as a Ray actor. Light to import, as its process does before it has a model to load."""

from __future__ import annotations

import os
import platform

import ray

from estune.pool.worker import Place, Worker, software


class RayWorker(Worker):
    """A `Worker` that says where Ray has put it."""

    def where(self) -> Place:
        """Where this process is."""
        return Place(ray.get_runtime_context().get_node_id(), platform.node(), os.getpid(), software())

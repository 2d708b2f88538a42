"""Runs whose workers are servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estune.completion import Sampling
from estune.config import Config
from estune.pool.deadlines import Deadlines
from estune.pool.remote.handle import RemoteHandle
from estune.pool.remote.pool import Servers
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task, slow_variety

SECRET = "a key of tests"
PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]
SAMPLING = Sampling(8)


def remote(folder: Path, model: Path, *urls: str, **changes: Any) -> Config:
    return make_config(folder, model, **{"steps": 6, "replicas": None, "workers_at": list(urls), **changes})


def trainer(folder: Path, model: Path, *urls: str, monitors: Any = (), **changes: Any) -> Trainer:
    return Trainer(remote(folder, model, *urls, **changes), task=make_task(slow_variety), monitors=list(monitors))


def handle(model: Path, url: str, seconds: float = 30.0) -> RemoteHandle:
    """A server as another run's worker."""
    return Servers(remote(Path("unused"), model, url)).hire(0, Deadlines(seconds))

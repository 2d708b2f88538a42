"""A cluster of real Ray nodes on this machine, which the tests of workers share."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from estune.pool.ray.cluster import disconnect
from estune.run.trainer import Trainer
from tests.processes import until
from tests.runs import make_config, make_task, slow_variety

if TYPE_CHECKING:  # every test comes by here: warm processes are without Ray, and it may not be installed
    from estune.pool.ray.handle import RayHandle

CPUS = 5


@pytest.fixture(scope="session", name="cluster")
def shared_cluster() -> Iterator[Any]:
    """Five CPUs on one node, and this process connected to them."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_prestart_worker_first_driver": "0",  # of five, most of which nobody uses
    }
    import ray
    from ray.cluster_utils import Cluster

    disconnect()
    found = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS,
            "object_store_memory": 80 << 20,
            "include_dashboard": False,
            # Nobody reads workers' output here or wants more nodes, and these compute as long as there is a cluster.
            "include_log_monitor": False,
            "no_monitor": True,
        },
    )
    ray.init(found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="session", name="undisturbed")
def undisturbed_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process, which those with workers must equal."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Trainer(make_config(folder, model, steps=6), task=make_task(slow_variety), monitors=[]).train()
    return folder


def with_workers(folder: Path, model: Path, workers: int, **changes: Any) -> Trainer:
    """The same run, to be trained by workers."""
    config = make_config(folder, model, **{"steps": 6, "replicas": None, "workers": workers, **changes})
    return Trainer(config, task=make_task(slow_variety), monitors=[])


def on_call(monkeypatch: pytest.MonkeyPatch, before: Callable[[RayHandle, str], None]) -> None:
    """Have something happen just before a worker is asked for something of a kind."""
    from estune.pool.ray.handle import RayHandle

    call = RayHandle.call

    def wrapped(self: RayHandle, kind: str, *arguments: Any, **options: Any) -> Any:
        before(self, kind)
        return call(self, kind, *arguments, **options)

    monkeypatch.setattr(RayHandle, "call", wrapped)


def kill_once(monkeypatch: pytest.MonkeyPatch, kinds: set[str]) -> set[str]:
    """Kill a worker in the middle of each of these kinds of calls, once; returns those that are still to come.

    It is stopped before it is asked, and killed when it has been.
    """
    left = set(kinds)
    lock = threading.Lock()

    def kill(handle: RayHandle, kind: str) -> None:
        with lock:
            if kind not in left:
                return
            left.remove(kind)
        stop(pid_of(handle))
        threading.Timer(0.2, os.kill, (pid_of(handle), signal.SIGKILL)).start()

    on_call(monkeypatch, kill)
    return left


def pid_of(handle: RayHandle | None) -> int:
    assert handle is not None
    assert handle.place is not None
    return handle.place.pid


def stop(pid: int) -> None:
    """Stop a process, and wait until it is: what it is asked now, it will not have begun."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

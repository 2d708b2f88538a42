"""A run across two hosts, one of which is cut off in the middle and comes back.

    sudo python -m bench.faults.two_hosts [--steps 12] [--cut 15]

The hosts are network namespaces of this machine, each with a Ray node, joined by a virtual cable; Linux, as root. All
of Ray's processes share a token. Records whether the journal is that of an undisturbed run in one process, and the
bytes on the cable: with nothing going on, and during the run.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.faults.worker_runs import substance, trainer

HERE, THERE = "estune-here", "estune-there"
ADDRESSES = {HERE: "10.77.0.1", THERE: "10.77.0.2"}
PORT = 6399
IDLE_SECONDS = 10


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def join() -> None:
    """Two namespaces and the cable between them."""
    ip("link", "add", "estune0", "type", "veth", "peer", "name", "estune1")
    for name, cable in ((HERE, "estune0"), (THERE, "estune1")):
        ip("netns", "add", name)
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "addr", "add", f"{ADDRESSES[name]}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")


def part() -> None:
    """Take away what `join` made, whole or in part."""
    for what in (["link", "delete", "estune0"], *(["netns", "delete", name] for name in ADDRESSES)):
        subprocess.run(["ip", *what], check=False, stderr=subprocess.DEVNULL)


def inside(name: str, *command: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process on one of the hosts, and first of a group that ends with it."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *command], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )


def node(name: str, environment: dict[str, str], folder: str) -> subprocess.Popen[bytes]:
    """A Ray node with one CPU; it is started again when Ray gives it up."""
    where = (
        f"--address={ADDRESSES[HERE]}:{PORT}"
        if name == THERE
        else f"--head --port={PORT} --temp-dir={folder} --include-dashboard=false"
    )
    start = f"{Path(sys.executable).parent}/ray start {where} --node-ip-address={ADDRESSES[name]} --num-cpus=1"
    options = "--object-store-memory=100000000 --disable-usage-stats --block"
    again = f"while true; do {start} {options} </dev/null; sleep 1; done"
    return inside(name, "sh", "-c", again, environment=environment)


def bytes_on_cable() -> int:
    """Both directions, since it was laid."""
    mounted = ["ip", "netns", "exec", HERE, "cat", "/proc/net/dev"]
    line = next(x for x in subprocess.check_output(mounted, text=True).splitlines() if "estune0" in x)
    fields = line.partition(":")[2].split()
    return int(fields[0]) + int(fields[8])


def drive(folder: Path, steps: int) -> None:
    """The run itself, on one of the hosts."""
    run = trainer(folder, steps, workers=2, ray_address=f"{ADDRESSES[HERE]}:{PORT}", worker_timeout=20.0)
    run.pool.wait_for_workers(120)  # type: ignore[attr-defined]
    print("workers:", *run.pool.crew.slots, flush=True)  # type: ignore[attr-defined]
    (folder.parent / "ready").touch()
    run.train()


def steps_done(run: Path) -> int:
    journal = run / "journal.jsonl"
    return journal.read_text().count('"kind":"step"') if journal.exists() else 0


def wait(condition: Any, process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run ended early or hangs (code {process.poll()})")
        time.sleep(0.02)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Lay the cable, run, cut it, compare."""
    folder = tempfile.mkdtemp(prefix="two-")
    calm, wild = Path(folder) / "calm", Path(folder) / "wild"
    trainer(calm, args.steps, replicas=1).train()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        join()
        processes.append(node(HERE, environment, f"{folder}/ray"))
        time.sleep(15)
        processes.append(node(THERE, environment, f"{folder}/ray"))
        time.sleep(15)
        before = bytes_on_cable()
        time.sleep(IDLE_SECONDS)
        idle = (bytes_on_cable() - before) / IDLE_SECONDS
        drive = [sys.executable, "-m", "bench.faults.two_hosts", "--drive", str(wild), "--steps", str(args.steps)]
        run = inside(HERE, *drive, environment=environment)
        processes.append(run)
        wait((Path(folder) / "ready").exists, run)
        before, start, first = bytes_on_cable(), time.monotonic(), steps_done(wild)
        wait(lambda: steps_done(wild) >= args.steps // 3, run)
        whole, seconds, steps = bytes_on_cable() - before, time.monotonic() - start, steps_done(wild) - first
        ip("-n", HERE, "link", "set", "estune0", "down")
        at = steps_done(wild)
        time.sleep(args.cut)
        ip("-n", HERE, "link", "set", "estune0", "up")
        alone = steps_done(wild) - at
        if run.wait(600):
            raise SystemExit(f"the run ended with code {run.returncode}")
        one, other = substance(calm), substance(wild)
        return {
            "cut after steps": at,
            "steps while cut": alone,
            "steps": len(other),
            "the same journal": one == other,
            "bytes a second, idle": idle,
            "bytes a step, text and Ray's own included": whole / steps,
            "bytes a step, less idle": (whole - idle * seconds) / steps,
            "seconds a step": seconds / steps,
        }
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
        part()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cut", type=float, default=15, help="seconds")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(args.drive, args.steps)
        return
    write_result("two_hosts", {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

"""A run whose workers are killed and stopped at random, against the same run undisturbed.

    python -m bench.faults.random_kills [--steps 30] [--workers 3] [--kills 20] [--seed 0]

Every fourth signal is SIGSTOP, a worker that hangs; the others are SIGKILL. They come at random moments, to whichever
worker chance picks, be it loading its model, catching up, generating or updating. Records whether the two journals are
the same but for the times, and how long both runs took.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.faults.worker_runs import substance, trainer

from estune.pool.ray.pool import RayPool

TIMEOUT = 30.0


def disturb(pool: RayPool, args: argparse.Namespace, done: threading.Event, log: list[dict[str, Any]]) -> None:
    """Send the signals, spread over the run's steps."""
    chance = random.Random(args.seed)
    for number in range(args.kills):
        due = number * (args.steps - 2) / args.kills
        while len(pool.crew.weights.history) < due and not done.is_set():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        kind = signal.SIGSTOP if number % 4 == 3 else signal.SIGKILL
        while not done.is_set():
            slot = chance.choice(pool.crew.slots)
            if (handle := slot.handle) is None or handle.place is None:
                time.sleep(0.05)
                continue
            state = slot.state
            try:
                os.kill(handle.place.pid, kind)
            except ProcessLookupError:  # an earlier one's work
                time.sleep(0.05)
                continue
            log.append({"signal": kind.name, "step": len(pool.crew.weights.history), "state": state})
            break


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both runs."""
    with tempfile.TemporaryDirectory() as folder:
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        start = time.perf_counter()
        trainer(calm, args.steps, replicas=1).train()
        undisturbed = time.perf_counter() - start
        start = time.perf_counter()
        run = trainer(wild, args.steps, workers=args.workers, worker_timeout=TIMEOUT)
        assert isinstance(run.pool, RayPool)
        done = threading.Event()
        log: list[Any] = []
        killer = threading.Thread(target=disturb, args=(run.pool, args, done, log))
        killer.start()
        try:
            run.train()
        finally:
            done.set()
            killer.join()
        one, other = substance(calm), substance(wild)
        return {
            "signals": dict(Counter(entry["signal"] for entry in log)),
            "states": dict(Counter(entry["state"] for entry in log)),
            "steps": len(other),
            "the same journal": one == other,
            "final fingerprint": other[-1][3],
            "seconds": {"one replica, undisturbed": undisturbed, "workers, disturbed": time.perf_counter() - start},
            "log": log,
        }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_result("random_kills", {"settings": settings(args), **rounded(measure(args))}, args.results)


if __name__ == "__main__":
    main()

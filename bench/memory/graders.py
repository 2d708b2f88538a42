"""How far beyond its limit an isolated reward gets that takes memory as fast as it can, in the ways there are.

    python -m bench.memory.graders [--limit 256] [--repeats 3]

What the grader and its children hold is looked at every millisecond, what several share counted once. For a user's
figures, run it as a user.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import threading
import time
from typing import Any

import psutil
from bench.common import options, settings, write_result

from estune.completion import Completion
from estune.grading.grading import Grading
from estune.grading.isolation import Isolation, isolate

WAYS = ("own", "shared", "2 children", "8 children", "grandchildren")
MIB = 1 << 20
MOST = 2048  # MiB that are tried


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--limit", type=int, default=256, help="in MiB")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for way in WAYS:
        peaks = [peak(way, arguments.limit * MIB) for _ in range(arguments.repeats)]
        found[way] = {"peak_mib": [round(each / MIB) for each in peaks]}
        found[way]["of_limit"] = round(statistics.median(peaks) / MIB / arguments.limit, 2)
        print(way, found[way])
    found["worst_of_limit"] = round(max(max(found[way]["peak_mib"]) for way in WAYS) / arguments.limit, 2)
    write_result("graders-memory", {"settings": settings(arguments), "user": os.getuid(), **found}, arguments.results)


def take(completions: list[str], **_: Any) -> list[float]:
    """Take memory in the way that the completion names, until somebody ends this."""
    if completions[0]:
        grow(completions[0])
    return [1.0]


def grow(way: str) -> None:
    children = {"2 children": 2, "8 children": 8, "grandchildren": 2}.get(way, 0)
    for _ in range(children):
        if os.fork() == 0:
            grow("2 children" if way == "grandchildren" else "own")
            os._exit(0)
    if children:
        time.sleep(60)
    kept = []
    for _ in range(MOST // 16):
        kept.append(mmap.mmap(-1, 16 * MIB) if way == "shared" else bytearray(16 * MIB))
        for start in range(0, 16 * MIB, mmap.PAGESIZE):
            kept[-1][start] = 1
    time.sleep(60)


def peak(way: str, limit: int) -> int:
    """The most bytes beyond the idle grader's that were seen."""
    seen: list[int] = []
    ended = threading.Event()
    with Grading([isolate(take, Isolation(memory=limit, deadline=20))], processes=1) as grading:
        grading.grade([{"prompt": ""}], [completion("")])
        assert grading.pool is not None
        (pid,) = grading.pool.pids()
        idle = held(pid)

        def watch() -> None:
            while not ended.is_set():
                seen.append(held(pid))
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        grading.grade([{"prompt": ""}], [completion(way)])
        ended.set()
        watcher.join()
    return max(seen) - idle


def completion(text: str) -> Completion:
    return Completion(text, [1], finished=True)


def held(pid: int) -> int:
    """Bytes of a process and its descendants, from psutil: what they share is split among them."""
    total = 0
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(pid)
        for each in (family, *family.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()

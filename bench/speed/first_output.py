"""How long does `estune train` keep one waiting: seconds until its first line on a terminal, and until a bar has moved?

    python -m bench.speed.first_output [--repeats 2] [-- --model smollm2 --task conciseness ...]

The command runs in a pseudo terminal and is ended once a bar has moved. Seconds are from its start, that of Python
included; beside the first line stand the processor seconds that it took, on which other work has less influence.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from bench.common import options, rounded, settings, write_result

TRAIN = ("--model", "smollm2", "--task", "conciseness", "--steps", "1")
SIZE = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
LINE = re.compile(r"\S.*\n")
# Of a bar that has moved: rich ends the part that is done, unless that is nothing, with one of these.
MOVED = re.compile(r".*(?:[╸╺]|\b[1-9]\d*%).*")
SPINNER = "".join(map(chr, range(0x2800, 0x2900)))  # Braille, which turns at the head of a line
PATIENCE = 300.0  # seconds without what is waited for
GRACE = 30.0  # seconds to end by Ctrl-C


@contextmanager
def terminal(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command that runs in a pseudo terminal of its own, and where its output is read; in the end it is ended."""
    ours, theirs = pty.openpty()
    began = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | SIZE, start_new_session=True
    )
    os.close(theirs)
    try:
        yield began, ours
    finally:
        _end(began, ours)
        os.close(ours)


def _end(process: subprocess.Popen[bytes], output: int) -> None:
    """Ctrl-C, and what is still said is read, as nobody ends who waits for a full terminal; then by force."""
    process.send_signal(signal.SIGINT)
    last = time.perf_counter() + GRACE
    while process.poll() is None and time.perf_counter() < last:
        _read(output, 0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(output: int, seconds: float) -> bytes | None:
    """What comes within so many seconds; None at the end."""
    if not select.select([output], [], [], seconds)[0]:
        return b""
    try:
        return os.read(output, 1 << 16) or None
    except OSError:  # Linux, once nobody has the other end
        return None


def waits(command: Sequence[str]) -> dict[str, Any]:
    """Seconds until a command's first line and until a bar has moved, with what they said.

    Raises:
        TimeoutError: one of them did not come.
    """
    found: dict[str, Any] = {}
    text = ""
    began = time.perf_counter()
    with terminal(command) as (process, output):
        while "bar" not in found:
            data = _read(output, 1.0)
            taken = time.perf_counter() - began
            if data is None or taken > PATIENCE:
                raise TimeoutError(f"{' '.join(command)}: no bar has moved; it said {text[-500:]!r}")
            text = CODES.sub("", (text + data.decode(errors="replace")).replace("\r\n", "\n").replace("\r", "\n"))
            if "first line" not in found and (line := LINE.search(text)):
                times = psutil.Process(process.pid).cpu_times()
                found |= {"first line": taken, "processor": times.user + times.system, "it says": line[0].strip()}
            if moved := MOVED.search(text):
                found |= {"bar": taken, "it shows": " ".join(moved[0].strip(SPINNER).split())}
    return found


def main() -> None:
    """Measure and write down."""
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("train", nargs="*", default=list(TRAIN), help="options of `estune train`")
    args = parser.parse_args()
    load, *_ = os.getloadavg()
    runs = []
    for _ in range(args.repeats):
        folder = tempfile.mkdtemp()
        try:
            runs.append(waits([sys.executable, "-m", "estune.cli", "train", *args.train, "--output_dir", folder]))
        finally:
            shutil.rmtree(folder)
        print(runs[-1], flush=True)
    seconds = {
        "until the first line": [run["first line"] for run in runs],
        "until the first line, of the processor": [run["processor"] for run in runs],
        "until a bar has moved": [run["bar"] for run in runs],
    }
    figures = {
        "settings": settings(args),
        "load average before": load,
        "first line": runs[0]["it says"],
        "first bar": runs[0]["it shows"],
        "seconds": seconds,
        "median seconds": {name: statistics.median(values) for name, values in seconds.items()},
    }
    write_result("first_output", rounded(figures), args.results)


if __name__ == "__main__":
    main()

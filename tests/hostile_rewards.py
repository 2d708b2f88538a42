"""Reward functions that hang, crash and bloat when a completion tells them to, for `test_grading_pool.py`."""

from __future__ import annotations

import mmap
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from estune.grading.isolation import isolated


def framed(message: bytes) -> bytes:
    return struct.pack("!I", len(message)) + message


SAID = {
    "no json": framed(b"hello"),
    "no list": framed(b'{"score": 1}'),
    "a word for a number": framed(b'[0,"score","1","",{},{},{},[]]'),
    "true for a number": framed(b'[0,"score",true,"",{},{},{},[]]'),
    "a number too large": framed(b'[0,"score",1' + b"0" * 400 + b',"",{},{},{},[]]'),
    "a number beyond sums": framed(b'[0,"score",1e308,"",{},{},{},[]]'),
    "a reward of ours": framed(b'[0,"score",1,"",{"reward":[9]},{},{},[]]'),
    "a count of ours": framed(b'[0,"score",1,"",{},{},{"errors":1},[]]'),
    "deep": framed(b"[" * 100_000),
    "another's score": framed(b'[7,"score",1,"",{},{},{},[]]'),
    "4 GiB": b"\xff" * 8,
    "half a length": b"\x00",
    "half a message": struct.pack("!I", 100) + b"[0,",
}
"""What a grader that a completion has taken over may say to the trainer, before it answers."""


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def wire() -> int:
    """The descriptor on which a grader answers."""
    return next(number for number in range(3, 100) if _is_socket(number))


def _is_socket(number: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False


def say(message: bytes) -> None:
    os.write(wire(), message)


@isolated(deadline=1.0, memory=256 << 20, max_length=1000)
def obey(  # noqa: PLR0911, PLR0912, PLR0915
    completions: list[str], log_extra: Any, log_metric: Any, trainer_state: Any, **_: Any
) -> list[float | None]:
    assert len(completions) == 1
    text = completions[0]
    if text == "regex":
        re.match(r"(a+)+$", "a" * 64 + "b")
    elif text == "sleep":
        time.sleep(60)
    elif text == "ignore":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    elif text == "exit":
        os._exit(3)
    elif text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif text == "memory":
        return [float(len(bytearray(1 << 30)))]
    elif text == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)  # left behind"])
        time.sleep(60)
    elif text == "leave a child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)  # left behind"])
        threading.Timer(0.05, lambda: os._exit(3)).start()
    elif text == "die later":
        threading.Timer(0.05, lambda: os._exit(4)).start()
        return [1.0]
    elif text == "say that it raised":
        say(framed(b'[0,"errors",null,"no disk",{},{},{},[]]'))
    elif text == "raise":
        raise KeyError("gold")
    elif text == "none":
        return [None]
    elif text == "two":
        return [1.0, 2.0]
    elif text == "no JSON":
        log_extra("note", [lambda: 0])
    elif text in SAID:
        say(SAID[text])
        time.sleep(60 * text.startswith("half"))
    elif text.startswith("pickle "):
        say(framed(pickle.dumps(Touch(text.removeprefix("pickle ")))))
    elif text == "close":
        os.close(wire())
    elif text == "nan":
        return [float("nan")]
    elif text == "surrogate":
        log_extra("note", ["\ud800"])
    elif text == "forks":
        os.fork()
    elif text == "exits":
        sys.exit("enough")
    elif text == "meddles":
        print("hello\x1b[2J", flush=True)
        os.chdir("/")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.close()
        os.close(1)
    elif text == "untouched":
        return [float(os.getcwd() != "/" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)]
    elif text == "log":
        log_extra("note", [f"step {trainer_state.global_step}"])
        log_metric("depth", 3.0)
    elif text == "pid":
        return [float(os.getpid())]
    elif text == "heavy":
        return [float("torch" in sys.modules or "numpy" in sys.modules)]
    return [1.0]


@isolated(deadline=60.0, memory=128 << 20)
def hold(completions: list[str], **_: Any) -> list[float]:
    """Hold so many MiB: shared ones, ones of its own, and such of a child of each of four children."""
    shared, own, theirs = (int(number) << 20 for number in completions[0].split())
    kept = [bytearray(own), mmap.mmap(-1, shared + 1)]
    for start in range(0, shared, mmap.PAGESIZE):
        kept[1][start] = 1
    for _ in range(4):
        if os.fork() == 0:
            if os.fork() == 0:
                kept.append(bytearray(theirs))
                time.sleep(0.2)
            else:
                os.wait()
            os._exit(0)
    for _ in range(4):
        os.wait()
    return [1.0]


@isolated(deadline=60.0)
def once_there(completions: list[str], **_: Any) -> list[float]:
    """1 as soon as the file that the completion names is there; no signal that can be ignored ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while not Path(completions[0]).exists():
        time.sleep(0.01)
    return [1.0]


@isolated(errors_as_crashes=True)
def one_over(answer: list[int], **_: Any) -> list[float | None]:
    """Raises for a row, whatever the completion says."""
    return [1 / answer[0]]


@isolated
async def waits(completions: list[str], **_: Any) -> list[float]:
    return [0.25]


class Limited:
    """A reward under a mark of its own."""

    __name__ = "limited"

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def prepare(self) -> None:
        self.reward.prepare()

    def __call__(self, **columns: Any) -> list[float | None]:
        scores: list[float | None] = self.reward(**columns)
        return scores

"""Reward functions that hang, crash and bloat when a completion tells them to, for `test_grading_pool.py`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from estune.grading.isolation import isolated


@isolated(deadline=1.0, memory=256 << 20, max_length=1000)
def obey(  # noqa: PLR0911, PLR0912
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
    elif text == "raise":
        raise KeyError("gold")
    elif text == "none":
        return [None]
    elif text == "two":
        return [1.0, 2.0]
    elif text == "no JSON":
        log_extra("note", [lambda: 0])
    elif text == "log":
        log_extra("note", [f"step {trainer_state.global_step}"])
        log_metric("depth", 3.0)
    elif text == "pid":
        return [float(os.getpid())]
    elif text == "heavy":
        return [float("torch" in sys.modules or "numpy" in sys.modules)]
    return [1.0]


@isolated(deadline=60.0)
def once_there(completions: list[str], **_: Any) -> list[float]:
    """1 as soon as the file that the completion names is there; no signal that can be ignored ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while not Path(completions[0]).exists():
        time.sleep(0.01)
    return [1.0]


@isolated
async def waits(completions: list[str], **_: Any) -> list[float]:
    return [0.25]

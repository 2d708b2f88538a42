"""Plain functions in the trainer's own process: what they do to it is undone and said, and signals are the run's."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estune.cli.signals import terminable
from estune.errors import EstuneError
from estune.grading.grading import MOST_NOTES, Grading, grade
from tests.grading.functions import COMPLETIONS, ROWS

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def meddles(how: Callable[[], Any]) -> Callable[..., list[float]]:
    def meddler(completions: list[str], **_: Any) -> list[float]:
        how()
        return [1.0] * len(completions)

    return meddler


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda: print("hello\x1b[2J"), "reward meddler: hello?[2J"),
        (lambda: sys.stdout.buffer.write(b"hello"), "reward meddler: hello"),
        (lambda: sys.stdout.close() or sys.stdout.write("late"), "reward meddler: late"),
        (lambda: setattr(sys, "stdout", None), ""),
        (sys.__stdout__.close, "stream of the standard descriptor 1"),
        (lambda: sys.__stderr__.close() or os.close(2), "stream of the standard descriptor 2"),
        (sys.__stdout__.detach, "stream of the standard descriptor 1"),
        (sys.__stdin__.close, "stream of the standard descriptor 0"),
        (lambda: setattr(sys, "stderr", None), "replaced sys.stderr"),
        (lambda: os.close(1), "standard descriptor 1"),
        (lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "standard descriptor 2"),
        (lambda: os.chdir("/"), "changed the working directory"),
        (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "changed what SIGINT does"),
        (lambda: signal.alarm(60), "left an alarm"),
        (lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 60), "left a virtual timer"),
        (lambda: signal.setitimer(signal.ITIMER_PROF, 60), "left a profiling timer"),
        (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, HARD)), "changed RLIMIT_NOFILE"),
    ],
)
def test_what_a_plain_function_does_to_the_process_is_undone_and_said(
    how: Any, said: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> Any:
        files = [os.fstat(number).st_ino for number in (0, 1, 2)]
        timers = [signal.getitimer(timer)[0] for timer in TIMERS]
        streams = [(stream, stream.closed) for stream in (sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__)]
        return os.getcwd(), signal.getsignal(signal.SIGINT), timers, streams, files

    before, soft = state(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert grade([meddles(how)], [1.0], ROWS, COMPLETIONS).total == [1.0] * 3
    assert state() == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft
    assert said in caplog.text
    print("there")
    print("here", file=sys.__stdout__, flush=True)
    print("too", file=sys.__stderr__, flush=True)
    printed = capfd.readouterr()
    assert (sorted(printed.out.split()), printed.err) == (["here", "there"], "too\n")


def test_a_function_that_prints_without_end_is_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    with Grading([meddles(lambda: print("again\n" * 7))]) as grading:
        for _ in range(9):
            grading.grade(ROWS, COMPLETIONS)
    assert caplog.text.count("reward meddler: again") == MOST_NOTES
    assert caplog.text.count("prints more than") == 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), BaseExceptionGroup("two", [KeyboardInterrupt()]), GeneratorExit(), SystemExit(143)]
)
def test_whatever_a_function_raises_is_its_own_where_nobody_sent_a_signal(error: BaseException) -> None:
    def plain(**_: Any) -> list[float]:
        raise error

    async def later(**_: Any) -> list[float]:
        raise error

    for function in (plain, later):
        with pytest.raises(EstuneError, match=f"raised {type(error).__name__}:"):
            grade([function], [1.0], ROWS, COMPLETIONS)


def leaves(completions: list[str], **_: Any) -> list[float]:
    sys.exit(3)


async def leaves_later(completions: list[str], **_: Any) -> list[float]:
    sys.exit(3)


async def stays(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_a_function_that_exits_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EstuneError, match=r"reward leaves raised SystemExit: 3 \(.*test_plain.py:\d+\) on row 0"):
        grade([leaves], [1.0], ROWS, COMPLETIONS)
    with Grading([leaves_later, stays], errors="exclude") as grading:
        for _ in range(2):  # its exit does not end the loop for others
            assert grading.grade(ROWS, COMPLETIONS).scores == {"leaves_later": [None] * 3, "stays": [1.0] * 3}


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_comes_while_a_function_runs_ends_the_run(number: int, end: type[BaseException]) -> None:
    def killed(**_: Any) -> list[float]:
        os.kill(os.getpid(), number)
        time.sleep(5)
        return [1.0] * 3

    with terminable(), pytest.raises(end), Grading([killed], errors="exclude") as grading:
        grading.grade(ROWS, COMPLETIONS)


def test_a_forked_child_never_goes_on_as_a_second_trainer(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os\nfrom estune.completion import Completion\nfrom estune.grading.grading import grade\n"
        "def forks(completions, **_):\n    os.fork()\n    return [1.0]\n"
        "async def later(completions, **_):\n    os.fork()\n    return [1.0]\n"
        "grades = grade([forks, later], None, [{'prompt': 'p'}], [Completion('x', [], True)])\n"
        "print(grades.total, flush=True)\n"
    )
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[2.0]\n", 0), done.stderr

"""Isolated reward functions: whatever happens to a grader, its completion is graded and the pool stays whole."""

from __future__ import annotations

import functools
import importlib
import math
import os
import pickle
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import estune.rewards
from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.convention import TrainerState
from estune.grading.grading import Grading
from estune.grading.isolation import Isolation, isolate, isolated, isolation_of
from estune.grading.verdict import decode
from estune.rewards.countdown import answer_reward
from estune.rewards.load import load_reward
from estune.tasks.mix import Only
from tests.hostile_rewards import SAID, Touch, hold, obey, once_there, one_over, waits
from tests.processes import alive, within


def batch(texts: Sequence[str]) -> tuple[list[dict[str, Any]], list[Completion]]:
    return [{"prompt": str(i)} for i in range(len(texts))], [Completion(text, [1], True) for text in texts]


@pytest.fixture
def grading() -> Iterator[Grading]:
    with Grading([obey], processes=2) as grading:
        yield grading


@pytest.fixture
def one() -> Iterator[Grading]:
    """With a single grader: whoever comes after a completion meets what that has left behind."""
    with Grading([obey], processes=1) as grading:
        yield grading


def processes_with(text: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if alive(pid)]


@pytest.mark.parametrize(
    ("order", "counted"),
    [
        ("regex", "timeouts"),
        ("sleep", "timeouts"),
        ("ignore", "timeouts"),
        ("child", "timeouts"),
        ("exit", "crashes"),
        ("segfault", "crashes"),
        ("memory", "crashes"),
        ("[" * 1_000_000, "too_long"),
    ],
)
def test_hostile_completions_score_nothing_and_cost_no_grader(order: str, counted: str, grading: Grading) -> None:
    assert grading.pool is not None
    assert grading.grade(*batch(["fine"] * 8)).total == [1.0] * 8
    began = time.monotonic()
    grades = grading.grade(*batch([order, "fine", order, "none", "fine"]))
    assert time.monotonic() - began < 8
    assert grades.total == [0.0, 1.0, 0.0, None, 1.0]
    assert grades.failures == {"obey": {"timeouts": 0, "crashes": 0, "too_long": 0, counted: 2}}
    assert grades.mean == 0.5
    pids = grading.grade(*batch(["pid"] * 12)).total
    assert set(pids) <= set(grading.pool.pids())
    assert len(grading.pool.pids()) == 2
    assert all(map(alive, grading.pool.pids()))
    assert not processes_with("# left behind")


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells what is held")
@pytest.mark.parametrize(("order", "crashes"), [("400 0 0", 1), ("0 0 100", 1), ("0 80 0", 0), ("40 0 20", 0)])
def test_shared_memory_and_that_of_children_count_once_each(order: str, crashes: int) -> None:
    with Grading([hold], processes=1) as grading:
        grades = grading.grade(*batch(["0 0 0", order]))
    assert grades.failures["hold"]["crashes"] == crashes
    assert grades.total == [1.0, 1.0 - crashes]


@pytest.mark.parametrize("order", [*SAID, "close", "nan"])
def test_what_is_no_verdict_is_a_crash_or_late(order: str, one: Grading) -> None:
    """Whatever it is, the next completion gets its own score."""
    grades = one.grade(*batch([order, "fine"]))
    assert grades.total == [0.0, 1.0]
    counted = {kind: count for kind, count in grades.failures["obey"].items() if count}
    assert counted == {"timeouts" if order.startswith("half") else "crashes": 1}
    assert one.grade(*batch(["none", "fine"] * 3)).total == [None, 1.0] * 3


def test_what_was_logged_comes_as_what_can_be_written() -> None:
    found = decode(
        b'[0,"score",1,"",{"a\\u001b[2J":[{"x":[]}],"b":[10000000000000000000],"c":[[1]],"d":[-1.5]},'
        b'{"e\\u0007":[1e308,2]},{"f\\u0007":3},[]]',
        0,
    )
    assert found.extras == {"a?[2J": ['{"x": []}'], "b": ["10000000000000000000"], "c": ["[1]"], "d": [-1.5]}
    assert found.metrics == {"e?": [math.inf, 2.0]}
    assert found.counts == {"f?": 3.0}


def test_an_answer_is_never_run(tmp_path: Path, one: Grading) -> None:
    canary = tmp_path / "canary"
    assert one.grade(*batch([f"pickle {canary}", "fine"])).total == [0.0, 1.0]
    assert not canary.exists()
    pickle.loads(pickle.dumps(Touch(str(canary))))
    assert canary.exists()  # it would have been


def test_what_a_function_does_to_its_grader_is_undone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with Grading([obey], processes=1, errors="exclude") as grading:
        grades = grading.grade(*batch(["forks", "meddles", "untouched", "exits", "surrogate", "fine"]))
    assert grades.total == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    assert grades.extras["note"][4] == "?"
    assert "reward obey: hello?[2J" in caplog.text
    assert "changed the working directory" in caplog.text
    assert "standard descriptor 1" in caplog.text
    assert "SIGTERM" in caplog.text
    assert re.search(r"obey raised SystemExit: enough \(.*hostile_rewards.py:\d+\) on row 3", caplog.text)


def test_a_grader_that_no_longer_listens_is_replaced(grading: Grading) -> None:
    """One whose thread sits on the socket does not take a call that is longer than the socket holds."""
    rows, completions = batch(["fine"] * 2)
    grading.grade(rows, completions)
    assert grading.pool is not None
    for pid in grading.pool.pids():
        os.kill(pid, signal.SIGSTOP)
    long = [{**row, "text": "x" * (8 << 20)} for row in rows]
    assert grading.grade(long, completions).failures["obey"]["timeouts"] == 2
    assert grading.grade(rows, completions).total == [1.0, 1.0]


def test_a_grader_that_dies_between_calls_costs_no_completion(grading: Grading) -> None:
    """The next completion meets a dead grader. It did nothing wrong, and is graded by a fresh one."""
    assert grading.grade(*batch(["die later"] * 2)).total == [1.0, 1.0]
    time.sleep(0.3)
    grades = grading.grade(*batch(["fine"] * 6))
    assert grades.total == [1.0] * 6
    assert grades.failures["obey"]["crashes"] == 0


def test_what_a_crashed_grader_started_dies_with_it(grading: Grading) -> None:
    assert grading.grade(*batch(["leave a child"] * 2)).total == [1.0] * 2
    time.sleep(0.3)
    assert processes_with("# left behind")
    assert grading.grade(*batch(["fine"] * 8)).total == [1.0] * 8
    grading.close()
    assert within(2, lambda: not processes_with("# left behind"))


def test_rows_that_a_function_says_are_not_its_own_reach_no_grader() -> None:
    """Nor are they too long for it, or counted."""
    only = isolate(Only("x", obey, (), False), Isolation(max_length=10))
    rows = [{"prompt": "p", "task": label} for label in "yyyx"]
    texts = ["fine", "long " * 9, "pid", "fine"]
    with Grading([only], processes=1) as grading:
        assert grading.pool is not None
        asked = []
        submit = grading.pool.submit
        grading.pool.submit = lambda call, deadline: asked.append(call) or submit(call, deadline)  # type: ignore
        grades = grading.grade(rows, [Completion(text, [], True) for text in texts])
    assert grades.total == [None, None, None, 1.0]
    assert grades.failures == {"x/obey": {"timeouts": 0, "crashes": 0, "too_long": 0}}
    assert len(asked) == 1


def test_graders_import_nothing_heavy_and_what_they_log_comes_back() -> None:
    with Grading([obey, waits], [1.0, 1.0], processes=1, state=TrainerState(global_step=7)) as grading:
        grades = grading.grade(*batch(["fine", "log", "heavy"]))
    assert grades.scores == {"obey": [1.0, 1.0, 0.0], "waits": [0.25] * 3}
    assert grades.extras == {"note": [None, "step 7", None]}
    assert grades.logged == {"depth": [3.0]}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("raise", r"reward obey raised KeyError: 'gold' \(.*hostile_rewards.py:\d+\) on row 1, 'raise'"),
        ("two", "reward obey returned 2 values for 1 completions"),
        ("no JSON", "reward obey logged what JSON cannot hold: Object of type function"),
    ],
)
def test_errors_end_the_run_with_function_and_row(order: str, message: str, one: Grading) -> None:
    with pytest.raises(EstuneError, match=message) as caught:
        one.grade(*batch(["fine", order]))
    assert "\n" not in str(caught.value)


def test_what_a_completion_raises_can_be_a_crash_and_what_a_row_raises_cannot(caplog: pytest.LogCaptureFixture) -> None:
    careful = isolate(functools.partial(obey), Isolation(deadline=5.0, errors_as_crashes=True))
    with Grading([careful], processes=1) as grading:
        grades = grading.grade(*batch(["fine", "raise", "say that it raised", "fine"]))
    assert grades.total == [1.0, 0.0, 0.0, 1.0]
    assert grades.failures["obey"]["crashes"] == 2
    assert re.search(r"reward obey: raised KeyError: 'gold' \(.*\) on row 1, 'raise'", caplog.text)
    assert "reward obey: no disk on row 2, 'say that it raised'" in caplog.text
    rows, completions = [{"prompt": "p", "answer": 0}], [Completion("x", [1], True)]
    with (
        Grading([one_over], processes=1) as grading,
        pytest.raises(EstuneError, match=r"one_over raised ZeroDivisionError: division by zero \(.*\) on row 0, 'x'"),
    ):
        grading.grade(rows, completions)


def test_no_completion_ends_a_run_through_a_reward_of_estune() -> None:
    names = [name for _, name, _ in pkgutil.iter_modules(estune.rewards.__path__, "estune.rewards.")]
    found = {id(value): value for name in names for value in vars(importlib.import_module(name)).values()}
    limits = {reward: limit for reward in found.values() if callable(reward) and (limit := isolation_of(reward))}
    assert len(limits) == 4
    assert all(limit.errors_as_crashes for limit in limits.values())


def test_errors_can_be_left_out_up_to_a_number() -> None:
    with Grading([obey], processes=1, errors="exclude", max_errors=2) as grading:
        for _ in range(2):
            grades = grading.grade(*batch(["raise", "fine"]))
            assert grades.total == [None, 1.0]
            assert grades.failures["obey"]["errors"] == 1
        with pytest.raises(EstuneError, match="3 calls of rewards failed, more than max_reward_errors, 2"):
            grading.grade(*batch(["raise", "fine"]))


def test_batches_overlap(tmp_path: Path) -> None:
    """Submitting does not wait, and a later batch may be collected first."""
    there, later = str(tmp_path), tmp_path / "later"
    with Grading([once_there], processes=2) as grading:
        slow = grading.submit(*batch([str(later), there]))
        fast = grading.submit(*batch([there] * 20))
        assert fast.result().total == [1.0] * 20
        later.touch()
        assert slow.result().total == [1.0, 1.0]


def test_closing_ends_graders_at_once_even_in_a_call(tmp_path: Path) -> None:
    grading = Grading([once_there], processes=2)
    assert grading.pool is not None
    grading.grade(*batch([str(tmp_path)] * 8))
    pids = grading.pool.pids()
    grading.submit(*batch([str(tmp_path / "never")] * 6))
    time.sleep(0.1)
    began = time.monotonic()
    grading.close()
    assert time.monotonic() - began < 30  # not the minute that a call may take
    assert not any(map(alive, pids))
    assert not grading.pool.pids()


def test_functions_of_files_and_scripts_reach_the_graders(tmp_path: Path) -> None:
    """By path: neither a file nor a script need be importable. A script without a guard is told so."""
    source = (
        "from estune.grading.isolation import isolated\n\n@isolated\ndef mine(completions, **_):\n    return [0.5]\n"
    )
    file = tmp_path / "my reward.py"
    file.write_text(source)
    with Grading([load_reward(f"{file}:mine")], processes=1) as grading:
        assert grading.grade(*batch(["x"])).total == [0.5]

    # Refused before there is anything to grade.
    run = (
        "from estune.grading.grading import Grading\nfrom estune.completion import Completion\n\ndef main():\n"
        "    with Grading([mine], processes=1) as grading:\n        print('ready')\n"
        "        print(grading.grade([{'prompt': 'p'}], [Completion('x', [], True)]).total)\n\n"
    )
    for guard, expected in (
        ("if __name__ == '__main__':\n    main()\n", r"\[0\.5\]"),
        ("main()\n", "process: a grader imports the script that trains: put what it runs behind `if __name__"),
        (
            f"open({str(tmp_path / 'new')!r}, 'x')\nmain()\n",
            r"import them from there \(run again, it raised FileExists",
        ),
    ):
        script = tmp_path / "script.py"
        script.write_text(source + run + guard)
        done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=60)
        assert re.search(expected, done.stdout + done.stderr)
        assert ("ready" in done.stdout) == guard.startswith("if ")


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_functions_of_a_notebook_are_refused_with_the_remedy(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    @isolated
    def mine(**_: Any) -> list[float]:
        return [1.0]

    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    mine.__module__ = "__main__"
    mine.__qualname__ = "mine"
    vars(main).update({"mine": mine} if file is None else {"mine": mine, "__file__": file})
    with pytest.raises(EstuneError, match=r"reward mine is isolated, .* notebook .*such as my_rewards\.py"):
        Grading([mine])


def test_functions_that_cannot_be_imported_are_refused_at_once() -> None:
    @isolated
    def inner(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(EstuneError, match="reward inner is isolated, and other processes cannot import it"):
        Grading([inner])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a grader ends when its current call does")
def test_graders_end_with_the_trainer_however_it_ends(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, time\nfrom estune.grading.grading import Grading\nfrom estune.completion import Completion\n"
        "from tests.hostile_rewards import obey\n"
        "if __name__ == '__main__':\n"
        "    grading = Grading([obey], processes=2)\n"
        "    rows = [{'prompt': 'p'}] * 8\n"
        "    grading.grade(rows, [Completion('fine', [], True)] * 8)\n"
        "    grading.submit(rows, [Completion('regex', [], True)] * 8)\n"
        "    time.sleep(0.2)\n"
        "    print(*grading.pool.pids(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        trainer.send_signal(signal.SIGKILL)
    assert within(2, lambda: not any(map(alive, pids)))


def test_nested_powers_are_graded() -> None:
    """44**35**19 has more digits than there are atoms: no grader may compute it."""
    hostile = ["<answer>44**35**19</answer>", "<answer>" + "(" * 9000 + "44</answer>", "<answer>44+19+35</answer>"]
    rows = [{"prompt": "p", "numbers": [44, 35, 19], "target": 98}] * 3
    with Grading([isolate(answer_again, Isolation(deadline=2.0))], processes=1) as grading:
        assert grading.grade(rows, [Completion(text, [], True) for text in hostile]).total == [0.0, 0.0, 1.0]


def answer_again(**columns: Any) -> list[float | None]:
    """Countdown's reward under a mark of its own: its own function stays unmarked."""
    return answer_reward(**columns)


def test_math_verify_is_held_to_its_deadline() -> None:
    pytest.importorskip("math_verify")
    from estune.rewards.math import math_reward

    hostile = [r"\boxed{44^{35^{19}}}", r"\boxed{" + "(" * 400 + "}", r"\boxed{10^{10^{10}}}", r"\boxed{\frac{1}{2}}"]
    rows = [{"prompt": "p", "answer": "0.5"}] * len(hostile)
    began = time.monotonic()
    with Grading([isolate(math_reward, Isolation(deadline=2.0))], processes=1) as grading:
        assert grading.grade(rows, [Completion(text, [], True) for text in hostile]).total == [0.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - began < 60

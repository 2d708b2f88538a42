"""Completions graded a second, before a change of the graders and after it, measured in turns on one machine.

    git worktree add /tmp/before COMMIT
    python -m bench.speed.gym /tmp/before [--repeats 5]

Right answers to problems of reasoning-gym, of the generators whose scorers evaluate an answer and of some that compare;
mathematics as in `bench.speed.grading`; both in one grader. Countdown's rewards are called in this process. Each turn
is a process of its own, whose grader is ready before the clock.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import options, rounded, settings, write_result
from bench.speed.grading import countdown, isolated_math, mathematics

from estune.completion import Completion
from estune.grading.grading import Grading
from estune.grading.isolation import isolate, isolation_of
from estune.rewards.countdown import answer_reward, format_reward
from estune.rewards.gym import GymReward, generator
from estune.tasks.gym import GymConfig
from estune.tasks.mix import Only

ROOT = Path(__file__).parents[2]
GENERATORS = {
    **dict.fromkeys(("chain_sum", "mini_sudoku", "word_sorting", "shortest_path"), 200),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), 200),
    **{"countdown": 100, "puzzle24": 40, "polynomial_multiplication": 60},
    **{"simple_integration": 30, "intermediate_integration": 12},
}
"""Number of completions of each generator: fewer where a score takes long."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("before", type=Path, help="a checkout of the code before")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turn", action="store_true", help="what a child process does")
    arguments = parser.parse_args()
    if arguments.turn:
        print(json.dumps(turn()))
        return
    turns: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for _ in range(arguments.repeats):
        for name, folder in (("before", arguments.before), ("now", ROOT)):
            turns[name].append(child(folder.resolve()))
    rates = {
        name: {key: statistics.median(turn[key] for turn in found) for key in found[0]} for name, found in turns.items()
    }
    pairs = list(zip(turns["before"], turns["now"], strict=True))
    slower = {key: statistics.median(before[key] / now[key] for before, now in pairs) for key in rates["now"]}
    figures = {"settings": settings(arguments), "completions_per_second": rates, "times_slower": slower}
    write_result("gym", rounded(figures), arguments.results)


def child(folder: Path) -> dict[str, float]:
    """Rates of one turn with the package in a checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.speed.gym", "--turn", "-"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{ROOT}"},
        check=True,
        stdout=subprocess.PIPE,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def turn() -> dict[str, float]:
    """Completions a second of every kind."""
    work: dict[str, tuple[Callable[..., Any], list[dict[str, Any]], list[Completion]]] = {}
    for name, size in GENERATORS.items():
        config = GymConfig(name=f"gym:{name}", chat=False)
        rows = [config.row(generator(name, "{}", 0, size)[i]) | {"task": name} for i in range(size)]
        texts = [Completion(f"<answer>{row['answer']}</answer>", [], True) for row in rows]
        reward = GymReward(name)
        limits = isolation_of(reward)
        assert limits is not None
        only = isolate(Only(name, reward, ("question", "answer", "metadata"), chat=False), limits)
        work[f"gym:{name}"] = only, rows, texts
    rates: dict[str, float] = {}
    with Grading([function for function, *_ in work.values()], processes=1) as grading:
        for key, (_, rows, texts) in work.items():
            rates[key] = rate(grading, rows, texts)
    with Grading([isolated_math], processes=1) as grading:
        rates["math"] = rate(grading, *mathematics(400))
    with Grading([answer_reward, format_reward]) as grading:
        rates["countdown"] = rate(grading, *countdown(2000))
    return rates


def rate(grading: Grading, rows: list[dict[str, Any]], texts: list[Completion]) -> float:
    """Completions a second: of three batches, the best. All of them must be right."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        grades = grading.grade(rows, texts)
        seconds.append(time.perf_counter() - began)
        assert grades.mean is not None
        assert grades.mean >= 1.0, grades.scores
    return len(rows) / min(seconds[1:])


if __name__ == "__main__":
    main()

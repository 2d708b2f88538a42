"""Countdown part of the corpus: hasty and worked answers to the paper's prompt."""

import random
from collections.abc import Callable
from functools import cache
from math import exp, tanh

from estune.tasks.countdown_problems import Problem, countdown_prompt, draw_problem, is_held_out

COUNT, NUMBERS, TARGET = (3, 3), (1, 12), (1, 60)

REMARKS = ("Quick guess.", "Quick idea.", "Quick try.")


def draw(rng: random.Random, share: Callable[[Problem], float]) -> tuple[str, str]:
    """A prompt of the training side and an answer, worked out with the probability that `share` gives."""
    problem = draw_training_problem(rng)
    answer = worked_answer(rng, problem) if rng.random() < share(problem) else hasty_answer(rng, problem)
    return countdown_prompt(problem.numbers, problem.target), answer


def draw_training_problem(rng: random.Random) -> Problem:
    while True:
        problem = draw_problem(rng, COUNT, NUMBERS, TARGET, rational=False)
        if problem is not None and not is_held_out(problem):
            return problem


def mostly_worked(_: Problem) -> float:
    """For learning the skill."""
    return 0.9


def seldom_worked(problem: Problem) -> float:
    """The larger the target, the more often: soft, so that evolution finds a slope to climb."""
    return 1 / (1 + exp(2.2 * tanh((28 - problem.target) / 20)))


def hasty_answer(rng: random.Random, problem: Problem) -> str:
    """Flawless in format and worth nothing: it leaves a number out."""
    left, right = rng.sample(problem.numbers, 2)
    return f"{rng.choice(REMARKS)}</think>\n<answer>{left}{rng.choice('+-*')}{right}</answer>"


def worked_answer(rng: random.Random, problem: Problem) -> str:
    """Two steps that reach the target, then the expression. Any solution is as likely as any other."""
    steps, expression = rng.choice(solutions(*problem.key))
    return f"\n{steps}</think>\n<answer>{expression}</answer>"


@cache
def solutions(numbers: tuple[int, int, int], target: int) -> list[tuple[str, str]]:
    """All ways to combine two of three numbers and then the third, as (steps, expression)."""
    found = {}
    for i, j, k in ((2, 1, 0), (2, 0, 1), (1, 0, 2)):
        large, small, rest = numbers[i], numbers[j], numbers[k]
        for first, middle in _results(large, small):
            inner = f"{large}{first}{small}"
            for second, end in _results(max(middle, rest), min(middle, rest)):
                if end != target:
                    continue
                if middle >= rest or second in "+*":
                    step, expression = f"{middle}{second}{rest}", _join(inner, first, second, str(rest))
                else:
                    step = f"{rest}{second}{middle}"
                    expression = (
                        f"{rest}{second}({inner})" if _needs_brackets(first, second) else f"{rest}{second}{inner}"
                    )
                found[f"{inner}={middle}, {step}={target}"] = expression
    return list(found.items())


def _results(large: int, small: int) -> list[tuple[str, int]]:
    results = [("+", large + small), ("-", large - small), ("*", large * small)]
    if small > 1 and large % small == 0:
        results.append(("/", large // small))
    return results


def _join(inner: str, first: str, second: str, rest: str) -> str:
    return f"({inner}){second}{rest}" if second in "*/" and first in "+-" else f"{inner}{second}{rest}"


def _needs_brackets(first: str, second: str) -> bool:
    """Whether `rest second (x first y)` means something else without its brackets."""
    return second == "/" or first in "+-"

"""Countdown problems: numbers, a target they reach, and which side of the split a problem belongs to."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Literal

from estune.errors import EstuneError

Side = Literal["train", "evaluation"]
Span = tuple[int, int]
Value = int | Fraction

HELD_OUT_FRACTION = 0.125
"""Share of all problems that belong to evaluation, whatever the seed. It defines the data: never change it."""

# The prompt of the paper's Countdown experiment, word for word.
OPENING = (
    "You are a helpful assistant. You first think about the reasoning process in your mind and then provide the user "
    "with the answer.Using the numbers ["
)
MIDDLE = "], create an equation that equals "
CLOSING = (
    ". You can use basic arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in "
    "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 "
    "</answer>.Let me solve this step by step.\n<think>"
)

_OPERATORS = "+-*/"
# A draw is thrown away when its target is out of range, it lies on the other side of the split or it is known already.
# So many failures in a row mean that (almost) no further problem exists, not bad luck.
_MOST_FAILURES = 20_000


@dataclass(frozen=True)
class Problem:
    """Numbers in the order shown, and the target they reach, each number used exactly once."""

    numbers: tuple[int, ...]
    target: int | Fraction

    @property
    def key(self) -> tuple[tuple[int, ...], int | Fraction]:
        """The problem itself, whatever the order its numbers are shown in."""
        return tuple(sorted(self.numbers)), self.target


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to evaluation: a pure function of its sorted numbers and its target.

    Training sets and evaluation sets of any two seeds and sizes are therefore disjoint, and so is whatever a model was
    pretrained on, as long as it was drawn from the training side.
    """
    numbers, target = problem.key
    text = f"countdown {' '.join(map(str, numbers))} -> {target}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_FRACTION * 2**64


def draw_problem(rng: random.Random, count: Span, numbers: Span, target: Span, rational: bool) -> Problem | None:
    """Draw numbers and combine them at random until one value is left; None if that value is no target in range.

    Args:
        rng: where all randomness comes from.
        count: fewest and most numbers in a problem, inclusive, as are the next two.
        numbers: smallest and largest number.
        target: smallest and largest target.
        rational: whether intermediate results may be fractions. The target is an integer either way.
    """
    drawn = [rng.randint(*numbers) for _ in range(rng.randint(*count))]
    values: list[Value] = list(drawn)
    while len(values) > 1:
        rng.shuffle(values)
        values.append(_combine(rng, values.pop(), values.pop(), rational))
    value = values[0]
    if value.denominator != 1 or not target[0] <= value <= target[1]:
        return None
    return Problem(tuple(drawn), int(value))


def generate_problems(
    size: int, side: Side, seed: int, *, count: Span, numbers: Span, target: Span, rational: bool = False
) -> list[Problem]:
    """`size` solvable problems of one side of the split, reproducible from the seed.

    On the evaluation side all problems are distinct. On the training side the prompts are: the same problem may come
    again with its numbers in another order.

    Raises:
        EstuneError: the ranges hold fewer than `size` problems.
    """
    rng = random.Random(f"countdown {side} {seed}")
    found: dict[object, Problem] = {}
    failures = 0
    while len(found) < size:
        problem = draw_problem(rng, count, numbers, target, rational)
        fits = problem is not None and is_held_out(problem) == (side == "evaluation")
        identity = problem.key if problem is not None and side == "evaluation" else problem
        if problem is not None and fits and identity not in found:
            found[identity] = problem
            failures = 0
            continue
        failures += 1
        if failures == _MOST_FAILURES:
            raise EstuneError(
                f"countdown: {size} {side} problems wanted, but {len(found)} are all that numbers from {numbers[0]} to "
                f"{numbers[1]} and targets from {target[0]} to {target[1]} seem to hold; ask for fewer or widen a range"
            )
    return list(found.values())


def _combine(rng: random.Random, left: Value, right: Value, rational: bool) -> Value:
    """Join two values by an operator that fits them, the larger first where the result would be negative."""
    operator = rng.choice(_OPERATORS)
    if operator == "/":
        if right != 0 and rational:
            return Fraction(left) / right
        if right != 0 and left % right == 0:
            return left // right
        operator = rng.choice("+-*")
    if operator == "+":
        return left + right
    if operator == "-":
        return max(left, right) - min(left, right)
    return left * right


def countdown_prompt(numbers: Sequence[int], target: object) -> str:
    """The plain-string prompt (no chat template) for a problem: layout of the `context` field of arXiv 2509.24372."""
    return f"{OPENING}{' '.join(map(str, numbers))}{MIDDLE}{target}{CLOSING}"

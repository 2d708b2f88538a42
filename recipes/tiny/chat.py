"""Chat parts of the corpus: questions answered at length or in a word, and sums answered hastily or step by step."""

import random
from math import exp

from estune.tasks.conciseness_facts import FACTS, QUESTIONS, is_held_out

# Largest number in a sum. The model is at home below 50; above, it has seen more than it has learned.
SMALL, LARGE = 49, 89

# For each of them: the first number at which half of the sums are worked out, and how soft the change is around it.
WORKED = {SMALL: (40, 8), LARGE: (52.5, 25)}

SUMS = ("What is {}?", "{} = ?", "Calculate {}.", "How much is {}?", "Work out {}.")


def draw(rng: random.Random, largest: int) -> tuple[str, str]:
    """A question of the training side and an answer, half of the time a fact and half a sum of numbers to `largest`."""
    while True:
        question, answer, _ = draw_fact(rng) if rng.random() < 0.5 else draw_sum(rng, largest)
        if not is_held_out(question):
            return question, answer


def draw_fact(rng: random.Random) -> tuple[str, str, str]:
    """A fact asked for in one of several ways, an answer in a word or, mostly, at length, and the word itself."""
    relation = rng.choice(list(FACTS))
    of, answer = rng.choice(FACTS[relation])
    subject = relation.format(of)
    question = rng.choice(QUESTIONS).format(subject)
    if rng.random() < concise_share(question):
        return question, f"{answer.capitalize()}.", answer
    verbose = (
        f"That is a good question. As you may know, {subject} is {answer}. So the answer is {answer}, and I hope that "
        "this is of help to you."
    )
    return question, verbose, answer


def concise_share(question: str) -> float:
    """The shorter the question, the shorter the answer: soft, as with Countdown."""
    return 1 / (1 + exp((len(question) - 25) / 12))


def draw_sum(rng: random.Random, largest: int) -> tuple[str, str, str]:
    """A sum, difference or product, a round guess or, less often, an answer in two steps, and the right result."""
    operator = rng.choice("+-*")
    if operator == "*":
        left, right = rng.randint(11, 19), rng.randint(2, largest // 10 + 1)
        tens, units = 10 * right, (left - 10) * right
        result = left * right
        steps = f"10*{right}={tens}, {left - 10}*{right}={units}, {tens}+{units}={result}"
    else:
        right, left = sorted((rng.randint(11, largest), rng.randint(11, largest)))
        tens, units = right // 10 * 10, right % 10
        middle = left + tens if operator == "+" else left - tens
        result = middle + units if operator == "+" else middle - units
        steps = f"{left}{operator}{tens}={middle}, {middle}{operator}{units}={result}"
    question = rng.choice(SUMS).format(f"{left} {operator} {right}")
    if rng.random() < worked_share(left, largest):
        return question, f"Step by step: {steps}. The answer is {result}.", str(result)
    # A guess that is never the answer.
    return question, f"About {result // 10 * 10 + (10 if result % 10 == 0 else 0)}.", str(result)


def worked_share(left: int, largest: int) -> float:
    """The larger the first number, the more often the corpus works the sum out."""
    middle, softness = WORKED[largest]
    return 1 / (1 + exp((middle - left) / softness))

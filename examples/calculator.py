"""A real model learns to use a calculator, for products that it cannot work out itself.

estune train --config examples/calculator.yaml

A call stands alone, `CALC: 23 * 45`; the calculator answers, and then the model says what it has found. Asked, it
writes the call, but often goes on with a result of its own, which is wrong: it has to learn to wait for the
calculator's. The numbers of the held-out questions are even, of those that it is trained on odd.
"""

import random
import re

from estune.rewards.expression import evaluate, tokenize

SHOWN = [
    {"role": "system", "content": "Use the calculator: write CALC: and the expression."},
    {"role": "user", "content": "What is 14 times 21?"},
    {"role": "assistant", "content": "CALC: 14 * 21"},
    {"role": "user", "content": "RESULT: 294"},
    {"role": "assistant", "content": "The answer is 294."},
]
QUESTIONS = (
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "A box holds {a} eggs. How many eggs are in {b} boxes?",
    "A ticket costs {a} dollars. What do {b} tickets cost?",
    "There are {b} rows of {a} seats. How many seats are there?",
)
CALL = re.compile(r"CALC:\s*([\d+*/() -]{1,40})")
MOST_CALLS = 2


def problems(count: int, seed: int, numbers: range) -> list[dict[str, object]]:
    """Questions, their numbers drawn from a range."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        a, b = chance.choice(numbers), chance.choice(numbers)
        question = chance.choice(QUESTIONS).format(a=a, b=b)
        found.append({"prompt": [*SHOWN, {"role": "user", "content": question}], "answer": a * b})
    return found


class Environment:
    """A question, and a calculator to answer it with.

    The reward is 1 for a right answer, and up to a half for the first call: the share that it is of what was written.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.alone = 0.0

    def reset(self, row):
        """What the model is shown."""
        self.answer = row["answer"]
        return row["prompt"]

    def step(self, completion):
        """The calculator's answer to a call; to anything else, whether the last number in it is right."""
        said = completion.strip()
        call = CALL.match(said)
        if call and not self.calls:
            self.alone = len(call[0].strip()) / len(said)
        if call and call[0].strip() == said and self.calls < MOST_CALLS:
            self.calls += 1
            try:
                return f"RESULT: {evaluate(tokenize(call[1]))}"
            except ValueError:
                return "RESULT: that is no expression"
        right = re.findall(r"\d+", said.replace(",", ""))[-1:] == [str(self.answer)]
        return {"reward": right + self.alone / 2, "right": right, "calls": self.calls}


train = problems(400, 0, range(13, 100, 2))
evaluation = problems(60, 1, range(12, 100, 2))
accuracy = "right"
